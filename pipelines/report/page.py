"""The report as one self-contained page, and as Markdown for a terminal or a pull request."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template

from pipelines import best_of_n_report, measures, reward_training, summary, tournament
from pipelines.means import ends
from pipelines.report import figures, scoreboard
from pipelines.report.decks import Card, Side, decks
from pipelines.report.doubts import doubts
from pipelines.report.facts import Facts
from pipelines.tables import ruled
from pipelines.watching.states import SKIPPED, StageFacts
from pipelines.watching.status import duration

ERRORS = "± is one standard error."
GAINS = (
    "The gain is the mean difference to the policy before on the same prompts: less than two of its standard errors is no proof of a "
    "change."
)
ANSWERS = (
    "± is one standard error over prompts. Cut: the share of answers that ended at the limit of tokens. Distinct 1, 2, 3: the share of "
    "words, pairs and triples of words that are different, over all answers."
)
KL = "KL: the mean log ratio of the policy to answers.reference on its own samples."
GAMES = (
    "Shares of games, ± one standard error; a game is a prompt, asked in both orders, and a win needs both. n: games with a verdict; "
    "unread: verdicts that say nothing; no answer: the judge gave none. At equal length: the share of the first if both wrote as much, by "
    "logistic regression on the difference in length; empty where the lengths leave it open."
)
REWARDS = (
    "Rewards are beta times the log ratio of the trained policy to its reference, in nats; they and the share of pairs told apart are "
    "measured on held-out pairs."
)
BASELINES = (
    "By the length alone: a threshold. By the words alone: a classifier that sees only which words and marks occur in a response, not "
    "their order, which tells which model wrote it. Where these do as well, the reward model may know no more than they do."
)
TASKS = "± is one standard error, as lm-eval has it; n is how many rows were asked."
COLOURED = ("right", "wrong", "won", "lost")
TEMPLATE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
Rows = Sequence[Sequence[str]]


def html(facts: Facts) -> str:
    """The page: figures, tables and rows are in the file, nothing comes over a network."""
    sections = [(title, body) for title, make in SECTIONS.items() if (body := make(facts))]
    return TEMPLATE.substitute(
        title=escape(facts.title),
        state=escape(state(facts)),
        contents="".join(f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, _ in sections),
        sections="".join(f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{body}</section>' for title, body in sections),
    )


def markdown(facts: Facts) -> str:
    """Tables and warnings."""
    parts = [f"# {facts.title}", state(facts)]
    if said := [*([f"- **Stopped**: {facts.failure}"] if facts.failure else []), *(f"- **Warning**: {text}" for text in doubts(facts))]:
        parts.append("\n".join(said))
    told = notes(facts)
    for title, rows in tables(facts).items():
        parts += [f"## {title}\n\n{ruled(rows)}", *([told[title]] if title in told else [])]
    parts.append(f"## Stages\n\n{ruled(stage_table(facts.stages))}")
    parts += [f"## {title}\n\n{ruled(rows)}" for title, rows in ran_tables(facts).items()]
    parts.append(f"## Config\n\n```yaml\n{facts.config}```")
    return "\n\n".join(parts) + "\n"


def state(facts: Facts) -> str:
    """How far the run is, in a line."""
    done = sum(stage.seconds is not None for stage in facts.stages)
    seconds = sum(stage.seconds or 0 for stage in facts.stages)
    ended = facts.summary is not None
    best = f"; final policy: {facts.summary['final']}" if facts.summary and facts.summary.get("final") else ""
    stopped = f"; stopped early: {facts.summary['stopped']}" if facts.summary and facts.summary.get("stopped") else ""
    how = "ended" if ended else "stopped" if facts.failure else "under way"
    now = datetime.now().astimezone().isoformat(" ", "minutes")
    return f"{how}: {done} of {len(facts.stages)} stages, {duration(seconds)} of work{best}{stopped}; written {now}"


def tables(facts: Facts) -> dict[str, Rows]:
    """What is measured, by title; rows with the header first."""
    found: dict[str, Rows] = {}
    if facts.evaluations() or facts.trained():
        policies = policy_table(facts)
        # Of names alone there is nothing to say.
        found |= {"Policies": policies} if len(policies[0]) > 1 else {}
    rewards = facts.stage("rewards/metrics")
    if rewards:
        found["Reward models on held-out pairs"] = reward_training.table(rewards)
    if facts.best_of_n:
        found |= {f"Best of N: {title}": rows for title, rows in best_of_n_report.tables(facts.best_of_n).items()}
    return found | scoreboard.tables(facts.scoreboard())


def notes(facts: Facts) -> dict[str, str]:
    """What a reader of a table has to know, by its title."""
    scored = any(numbers.get("n") for numbers in facts.evaluations().values())
    gained = any(numbers.get("gain") for numbers in facts.evaluations().values())
    said = [*([ERRORS] if scored else []), *([GAINS] if gained else []), *([REWARDS] if facts.trained() else [])]
    said.append(ends((numbers["accuracy"], numbers["n"]) for numbers in facts.evaluations().values()))
    found = {"Policies": " ".join(filter(None, said))}
    measured = facts.scoreboard()["measures"]
    kl = any(numbers["kl"] for numbers in measured.values())
    found["Reward models on held-out pairs"] = BASELINES
    found["Answers to the prompts"] = " ".join(filter(None, (ANSWERS, KL if kl else "", ends(measures.shares(measured)))))
    found["Tasks"] = " ".join(filter(None, (TASKS, ends(scoreboard.shares(facts.scoreboard()["tasks"])))))
    found["Tournament: games of the first against the second"] = " ".join(
        filter(None, (GAMES, ends(tournament.rates(facts.stage("evaluation/tournament/games")))))
    )
    if judge := _judge(facts, "tournament"):
        asked = facts.stage("evaluation/tournament/questions")
        equal = f"{asked['equal']} of {asked['games']} games were between equal responses: ties, about which the judge was not asked."
        found["The judge"] = f"{judge} {equal}" if asked.get("equal") else judge
    if judge := _judge(facts, "mt_bench"):
        found["MT-Bench, grades from 1 to 10"] = judge
    return {title: said for title, said in found.items() if said}


def _judge(facts: Facts, what: str) -> str:
    """Who was asked, and how."""
    asked = facts.settings(f"evaluation/{what}/answers")
    who = asked.get("url_model") or facts.settings("evaluation/judge/model").get("path", "")
    place = f"at {asked['url']}" if asked.get("url") else ""
    mode = facts.settings(f"evaluation/{what}/questions").get("mode")
    return f"Who judged: {' '.join(filter(None, (who, place)))}{f', mode {mode}' if mode else ''}." if who or place else ""


def policy_table(facts: Facts) -> list[list[str]]:
    """Accuracy, and what training on pairs came to, of every policy so far."""
    trained = facts.trained()
    names = list(dict.fromkeys(s.policy for s in facts.stages if s.policy in facts.evaluations() or s.policy in trained))
    iterations = {name: summary.iteration_numbers({"train": {}}, {"rows": 0}, dict(numbers)) for name, numbers in trained.items()}
    unknown = {"accuracy": None, "stderr": None, "n": 0}
    found = {name: dict(facts.evaluations().get(name, unknown)) for name in names}
    return summary.table(found, iterations, {name: numbers["gain"] for name, numbers in found.items() if numbers.get("gain")})


def stage_table(stages: Sequence[StageFacts]) -> list[list[str]]:
    """The job graph in rows."""
    rows = [["stage", "state", "time", "of it work", "reads"]]
    for s in stages:
        rows.append([s.name, s.state, *(_time(seconds) for seconds in (s.seconds, s.work_seconds)), ", ".join(s.inputs)])
    return rows


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def _found(facts: Facts) -> str:
    said = [*([f"The job stopped: {facts.failure}"] if facts.failure else []), *doubts(facts)]
    warned = "".join(f"<li>{escape(text)}</li>" for text in said)
    warned = f'<ul class="warnings">{warned}</ul>' if warned else '<p class="calm">No warnings.</p>'
    told = {title: f'<p class="lead">{escape(note)}</p>' for title, note in notes(facts).items()}
    shown = "".join(f"<h3>{escape(title)}</h3>{table(rows)}{told.get(title, '')}" for title, rows in tables(facts).items())
    return warned + shown + figure(figures.accuracy(facts)) + figure(figures.ranking(facts))


def _graph(facts: Facts) -> str:
    """A row for everyone that the stages are about, its stages in their order; what they read is told by a tooltip and the table."""
    most = max((stage.seconds or 0 for stage in facts.stages), default=0) or 1
    groups: dict[str, list[StageFacts]] = {}
    for stage in facts.stages:
        groups.setdefault(stage.policy, []).append(stage)
    body = ""
    for name, stages in groups.items():
        boxes = "".join(_box(stage, most) for stage in stages)
        body += f'<div class="group"><span class="who">{escape(name)}</span><div class="boxes">{boxes}</div></div>'
    details = f"<details><summary>as a table, with what each stage reads</summary>{table(stage_table(facts.stages))}</details>"
    return f'<div class="graph">{body}</div>{details}'


def _box(stage: StageFacts, most: float) -> str:
    label = escape(stage.own)
    time = stage.state if stage.seconds is None else duration(stage.seconds)
    again = f" ({SKIPPED})" if stage.state == SKIPPED else ""
    share = 100 * (stage.seconds or 0) / most
    reads = escape(", ".join(stage.inputs) or "nothing")
    kind = stage.state.replace(" ", "-")
    return (
        f'<div class="box {kind}" title="{escape(stage.name)} reads {reads}"><b>{label}</b><span>{escape(time + again)}</span>'
        f'<i style="width:{share:.1f}%"></i></div>'
    )


def training(facts: Facts, beside: Sequence[Facts] = ()) -> str:
    """The curves of every training; `beside` as in `figures.training`."""
    return "".join(f"<h3>{escape(title)}</h3>{figure(svg)}" for title, svg in figures.training(facts, beside).items())


def _samples(facts: Facts) -> str:
    return figure(figures.lengths(facts))


def _best_of_n(facts: Facts) -> str:
    return figure(figures.best_of_n(facts))


def _decks(facts: Facts) -> str:
    return "".join(f"<h3>{escape(title)}</h3>{_deck(cards)}" for title, cards in decks(facts).items())


def _deck(cards: Sequence[Card]) -> str:
    buttons = '<button class="before">previous</button> <span class="place"></span> <button class="after">next</button>'
    return f'<div class="deck"><p class="browse">{buttons}</p>{"".join(map(_card, cards))}</div>'


def _card(card: Card) -> str:
    sides = "".join(map(_side, card.sides))
    return f'<div class="card"><h4>prompt</h4><pre class="prompt">{escape(card.prompt)}</pre><div class="sides">{sides}</div></div>'


def _side(side: Side) -> str:
    verdict = side.mark.partition(",")[0]
    kind = f"score {verdict}" if verdict in COLOURED else "score"
    mark = f' <span class="{kind}">{escape(side.mark)}</span>' if side.mark else ""
    return f"<article><h4>{escape(side.name)}{mark}</h4><pre>{escape(side.text)}</pre></article>"


def _ran(facts: Facts) -> str:
    config = f"<details><summary>config.yaml, resolved</summary><pre>{escape(facts.config)}</pre></details>"
    return f'<div class="pairs">{"".join(map(table, ran_tables(facts).values()))}</div>{config}'


def ran_tables(facts: Facts) -> dict[str, Rows]:
    """What ran on what, by title; rows with the header first."""
    return data_table(facts) | {"Versions": [["software", "version"], *([name, version] for name, version in facts.versions.items())]}


def data_table(facts: Facts) -> dict[str, Rows]:
    """What was read and set aside, if anything was."""
    found: dict[str, Rows] = {}
    for title, data in (("Data", facts.data()), ("Prompts", facts.prompts())):
        counts = list(dict.fromkeys(key for numbers in data.values() for key, value in numbers.items() if isinstance(value, int)))
        read = [[name, *(str(numbers.get(key, "")) for key in counts)] for name, numbers in data.items()]
        found |= {title: [["rows of", *(key.replace("_", " ") for key in counts)], *read]} if data else {}
    return found


def table(rows: Rows) -> str:
    """In HTML; the header is the first row."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(svg: str) -> str:
    """A plot, which may be missing."""
    return f'<figure class="scroll">{svg}</figure>' if svg else ""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


SECTIONS: Mapping[str, Callable[[Facts], str]] = {
    "What was found": _found,
    "Job graph": _graph,
    "Training": training,
    "Samples": _samples,
    "Best of N": _best_of_n,
    "Side by side": _decks,
    "What ran": _ran,
}
