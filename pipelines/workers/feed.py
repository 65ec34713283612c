"""Items for actors as a source of Ray Data's; imported where Ray is there."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask


class Feed(Datasource):
    """One read, whose blocks are the orders of an `actors.orders.Orders`, a row each, until there will be no more.

    Args:
        orders: the actor.
    """

    def __init__(self, orders: Any):
        super().__init__()
        self.orders = orders

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows."""
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        """The one."""
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_rows, self.orders), unknown)]


def _rows(orders: Any) -> Iterator[pa.Table]:
    """COLUMNS item."""
    number = 0
    while (order := ray.get(orders.next.remote(number))) is not None:
        yield pa.table({"item": [order]})
        number += 1
