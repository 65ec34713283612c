"""The engine that serves many callers: they share steps, go away, and are told when it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

PROBE = """
import asyncio, sys, time
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from actors.engine_loop import EngineDead, EngineLoop
from actors.generator import policy_engine
from actors.settings import Engine

llm = policy_engine(sys.argv[1], Engine(kv_cache_gib=0.1), 512, text=True)
steps = 0
step = llm.llm_engine.step
def counted():
    global steps
    steps += 1
    return step()
llm.llm_engine.step = counted
died = []
loop = EngineLoop(llm.llm_engine, died.append)

def params(tokens, kind=RequestOutputKind.FINAL_ONLY, **more):
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, output_kind=kind, **more)

async def whole(ids, params):
    return [output async for output in loop.outputs(ids, params)]

async def work():
    global steps
    alone = [(await whole([5, 6, n], params(20)))[-1].outputs[0].token_ids for n in (7, 8, 9)]
    steps = 0
    together = await asyncio.gather(*(whole([5, 6, n], params(20)) for n in (7, 8, 9)))
    assert [list(found[-1].outputs[0].token_ids) for found in together] == [list(ids) for ids in alone]
    assert steps < 40, steps
    pieces = await whole([5, 6, 7], params(20, RequestOutputKind.DELTA))
    assert len(pieces) > 10 and sum((list(p.outputs[0].token_ids) for p in pieces), []) == list(alone[0])
    several = (await whole([5, 6, 7], SamplingParams(n=3, max_tokens=4, output_kind=RequestOutputKind.FINAL_ONLY)))[-1]
    assert len(several.outputs) == 3
    try:
        await whole([0] * 600, params(4))
    except ValueError as error:
        assert "512" in str(error), error
    else:
        raise AssertionError("too long")
    gone = asyncio.create_task(whole([5, 6, 7], params(400)))
    await asyncio.sleep(0.2)
    assert loop.running() == 1
    gone.cancel()
    while loop.running():
        await asyncio.sleep(0.01)
    assert not llm.llm_engine.has_unfinished_requests()

    def broken():
        raise MemoryError("no room")
    llm.llm_engine.step = broken
    for _ in range(2):
        try:
            await whole([5], params(4))
        except EngineDead as error:
            assert "no room" in str(error)
        else:
            raise AssertionError("alive")
    assert [str(failure) for failure in died] == ["the engine failed: MemoryError: no room"], died

asyncio.run(work())
print("served")
"""


@pytest.mark.slow
def test_callers_share_an_engine(tiny: Path) -> None:
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROBE, str(tiny)], env=environment, capture_output=True, text=True, timeout=200)
    assert "served\n" in done.stdout, done.stdout[-1000:] + done.stderr[-3000:]
