"""What those who outlive a stage have to do next: a gang of training workers, or a pool of actors under Ray Data.

driver: give(...), give(...), end() --> Orders, an actor --> workers: next(0), next(1), ... None
"""

import asyncio
from typing import Any


class Orders:
    """A list that grows, and whoever waits for its next entry. An actor of Ray's: it ends with the driver that made it."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.over = False
        self.changed = asyncio.Condition()

    async def give(self, *orders: Any) -> None:
        """One or several more."""
        async with self.changed:
            self.given += orders
            self.changed.notify_all()

    async def end(self) -> None:
        """There will be no more."""
        async with self.changed:
            self.over = True
            self.changed.notify_all()

    async def next(self, number: int) -> Any:
        """Waits for an order by its number, from 0 on, and returns it; None when it will never be given."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.over or number < len(self.given))
            return self.given[number] if number < len(self.given) else None


def beside_the_driver(orders: type[Orders], *args: Any) -> Any:
    """Starts the actor on the driver's node: other nodes come and go."""
    import ray

    return ray.remote(**here())(orders).remote(*args)


def here() -> dict[str, Any]:
    """Ray's options for what runs on this node and needs no room there."""
    import ray

    return {"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
