"""The report's files, written anew whenever a stage begins or ends: a run in progress can be looked at."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.storage import replacing
from pipelines.run.artifacts import Stage

log = logging.getLogger("gsil")


class Reporter:
    """Writes `report.html` and `report.md` of a run.

    Args:
        root: the run directory.
        stages: its job graph, in order.
        prefix: of the names of the job's own files ("reward-" where it shares the directory).
    """

    def __init__(self, root: Path, stages: Sequence[Stage], prefix: str = ""):
        self.root, self.stages, self.prefix = root, stages, prefix
        self.page = root / f"{prefix}report.html"
        self.log: Sequence[Mapping[str, Any]] = ()
        """what `Run.log` tells so far: which stages were done before"""

    def __call__(self, failure: str | None = None) -> None:
        """Writes both. A report that cannot be written costs no stage: the log says why.

        Args:
            failure: why the job stops here.
        """
        from pipelines.report.facts import gather
        from pipelines.report.page import html, markdown

        try:
            facts = gather(self.root, self.stages, self.prefix, failure, self.log)
            for path, text in ((self.page, html(facts)), (self.page.with_suffix(".md"), markdown(facts))):
                with replacing(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        except Exception as error:
            log.warning("the report could not be written: %s: %s", type(error).__name__, error)
            log.debug("", exc_info=True)
