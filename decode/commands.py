"""The commands of the serving layer. Importing this imports no jax: each does when it runs."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from decode.config import EngineConfig
from jaxinfra.errors import UserError


def serve(
    model: Positional[str],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    keys: Path | None = None,
    drain: int = 60,
    disaggregate: bool = False,
    replicas: int = 1,
    gpus: int | None = None,
    offline: bool = False,
    engine: OmitArgPrefixes[EngineConfig] = EngineConfig(),  # noqa: B008 (immutable)
) -> None:
    """Serves a model over OpenAI's API, with a page to chat and to watch it.

    Args:
      model: a short name (smollm2-135m), a Hugging Face id, a folder or a .gguf file.
      host: the address to listen on.
      port: 0 picks one.
      name: of the model in the API; by default as given.
      dtype: of the weights; by default bfloat16 on an accelerator, float32 on a CPU.
      keys: a JSON file {tenant: key}; without it, and without JAXINFRA_API_KEY, none is asked.
        Both are read here, also for replicas.
      drain: seconds for the answers under way when told to end.
      disaggregate: one engine for prompts, another for answers; of several GPUs each has one.
      replicas: several such servers, on the machines of a Ray cluster, behind one address. Those
        on other machines listen on their address in the cluster: give keys, or a closed network.
      gpus: of each replica; by default `tp` of them where the cluster has GPUs.
      offline: use only what is on this machine.
    """
    if replicas < 1 or (gpus or 0) < 0:
        raise UserError(f"serve: {replicas=}, {gpus=}; give 1 or more, and 0 or more")
    if replicas == 1 and gpus is not None:
        raise UserError("serve: gpus are those of replicas; here CUDA_VISIBLE_DEVICES chooses")
    one = functools.partial(
        _server, model, name or model, dtype, _keys(keys), drain, disaggregate, offline, engine
    )
    if replicas == 1:
        return one(host=host, port=port)
    from decode import replicas as ray

    ray.run(one, replicas, host=host, port=port, gpus=gpus, each=engine.tp)


def _server(
    model: str, name: str, dtype: str | None, keys: dict[str, str], drain: int, disaggregate: bool,
    offline: bool, engine: EngineConfig, *, host: str, port: int,
) -> None:  # fmt: skip
    from decode.server.app import Settings
    from decode.server.run import run
    from decode.server.transport import InProcess
    from decode.server.two_engines import HALVES, TwoEngines
    from jaxinfra.text import Tokenizer
    from jaxinfra.weights.pull import pull

    path = pull(model, offline=offline)
    if engine.draft_model is not None and engine.draft_layers is None:
        draft = str(pull(engine.draft_model, offline=offline))
        engine = dataclasses.replace(engine, draft_model=draft)
    settings = Settings(name, keys, version=version("jaxinfra"))
    if disaggregate:
        if engine.tp > 1 or not engine.prefix_cache:
            raise UserError("serve: disaggregate needs the prefix cache, and pages uncut: no tp")
        halves = (functools.partial(_half, str(path), engine, dtype, kind) for kind in HALVES)
        spawn = functools.partial(TwoEngines, *halves)
    else:
        spawn = functools.partial(InProcess, functools.partial(_engine, str(path), engine, dtype))
    run(spawn, Tokenizer.from_path(path), settings, host=host, port=port, drain=drain)


def _engine(path: str, config: EngineConfig, dtype: str | None) -> Any:
    from decode.engine import Engine

    return Engine.load(path, config, dtype=dtype, offline=True)


def _half(path: str, config: EngineConfig, dtype: str | None, kind: str, folder: Path) -> Any:
    from decode.server.two_engines import take_gpu

    take_gpu(kind)
    from decode import handover

    if kind == "Prefills":  # it makes no answers
        config = dataclasses.replace(config, draft=0, draft_model=None)
    made = getattr(handover, kind).load(path, config, dtype=dtype, offline=True)
    made.carry(folder)
    return made


def _keys(path: Path | None) -> dict[str, str]:
    key = os.environ.get("JAXINFRA_API_KEY")
    if path is None:
        return {"default": key} if key else {}
    try:
        keys = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; give a JSON file of tenants and their keys") from None
    if not isinstance(keys, dict) or not all(isinstance(k, str) and k for k in keys.values()):
        raise UserError(f"{path}: give tenants and their keys, {{name: key}}")
    return keys


def batch(
    source: Positional[Path],
    out: Positional[Path],
    /,
    *,
    url: str,
    concurrency: int = 32,
    retries: int = 6,
) -> None:
    """Answers a file of requests, in OpenAI's batch format; the same command resumes.

    The key, where the server asks for one, is OPENAI_API_KEY's.

    Args:
      source: requests, a JSON object a line.
      out: where the answers go, in the same order.
      url: the server's address.
      concurrency: requests under way at once.
      retries: how often a request is tried again.
    """
    from decode import batch as batches

    if concurrency < 1 or retries < 0:
        raise UserError(f"batch: {concurrency=}, {retries=}; give 1 and 0 or more")
    key = os.environ.get("OPENAI_API_KEY", "")
    done = batches.run(source, out, url=url, concurrency=concurrency, key=key, retries=retries)
    print(batches.told(asyncio.run(done), out))


def bench_serve(
    *,
    url: str = "http://127.0.0.1:8000/v1",
    model: str = "",
    requests: int = 100,
    rate: float | None = None,
    concurrency: int | None = None,
    words: int = 200,
    answer: int = 100,
    prefixes: int = 0,
    shared: int = 0,
    trace: Path | None = None,
    speed: float = 1.0,
    chat: bool = False,
    seed: int = 0,
    ttft: float | None = None,
    tpot: float | None = None,
    e2e: float | None = None,
    out: Path | None = None,
) -> None:
    """Loads any OpenAI server and tells TTFT, TPOT, ITL, E2E, throughput and goodput.

    The key, where the server asks for one, is OPENAI_API_KEY's.

    Args:
      url: the server's address, ending in /v1.
      model: its name there.
      requests: how many.
      rate: requests a second, by Poisson's law; without it and concurrency, all at once.
      concurrency: keep so many under way instead.
      words: of each prompt.
      answer: tokens of each answer.
      prefixes: so many beginnings are shared among the prompts.
      shared: words of each beginning.
      trace: replay this file of JSON lines instead: prompt_tokens, max_tokens, timestamp.
      speed: replay so many times as fast.
      chat: ask for chats instead of completions.
      seed: of the prompts and the clock.
      ttft: bound of goodput on the time to the first token, in seconds.
      tpot: bound of goodput on the time a further token, in seconds.
      e2e: bound of goodput on the whole, in seconds.
      out: also write the figures, as JSON, here.
    """
    from rich.console import Console

    from decode import bench_serve as bench

    if requests < 1 or words < 1 or answer < 1 or speed <= 0 or (concurrency or 1) < 1:
        raise UserError("bench-serve: requests, words, answer, speed, concurrency: more than 0")
    if rate is not None and (rate <= 0 or concurrency is not None):
        raise UserError("bench-serve: give a rate of more than 0, or concurrency, not both")
    calls = bench.trace(trace, speed) if trace else bench.synthetic(
        requests, words=words, answer=answer, prefixes=prefixes, shared=shared, rate=rate, seed=seed
    )  # fmt: skip
    key = os.environ.get("OPENAI_API_KEY", "")
    loading = bench.load(url, model, calls, concurrency=concurrency, key=key, chat=chat)
    samples, took = asyncio.run(loading)
    figures = bench.summary(samples, took, bench.Bounds(ttft, tpot, e2e))
    Console().print(bench.render(figures))
    if out is not None:
        from jaxinfra.files import write_file

        write_file(out, json.dumps(figures, indent=2).encode())


def quantize(
    model: Positional[str],
    out: Positional[Path],
    /,
    *,
    method: Literal["rtn", "gptq", "awq"] = "rtn",
    bits: Literal[8, 4] = 8,
    group: int | None = None,
    float8: bool = False,
    head: bool = False,
    data: str = "stdlib",
    windows: int = 32,
    length: int = 512,
    held_out: int = 8,
    offline: bool = False,
) -> None:
    """Keeps a model's weights in 8 or 4 bits; tells perplexity, KL, size and speed side by side.

    The folder is in compressed-tensors' layout: `jaxinfra generate`, transformers and vLLM read it.

    Args:
      model: a short name (smollm2-135m), a Hugging Face id, a model folder or a .gguf file.
      out: the folder; it must not be there yet.
      method: rtn: round to nearest; gptq: an error is made good by later columns; awq: inputs that
        matter are scaled up first.
      bits: of a weight.
      group: inputs a scale; by default 128 at 4 bits, or the most that divides, and all at 8.
      float8: float8_e4m3 in place of int8.
      head: the head as well; it is then a matrix of its own.
      data: text to calibrate and compare on: stdlib, a file, a folder or hf:OWNER/NAME.
      windows: of text to calibrate on.
      length: tokens of each window.
      held_out: windows of other text to compare on.
      offline: use only what is on this machine.
    """
    from decode.quantize.run import run

    run(
        model, out, method=method, bits=bits, group=group, float8=float8, head=head, data=data,
        count=windows, length=length, held_out=held_out, offline=offline,
    )  # fmt: skip


def route(
    urls: Positional[tuple[str, ...]],
    /,
    *,
    policy: Literal["affinity", "load", "prefix", "turns"] = "prefix",
    host: str = "127.0.0.1",
    port: int = 8080,
) -> None:
    """One address for several OpenAI servers: by prefix, session, load, or in turns.

    Args:
      urls: the servers' addresses.
      policy: prefix: where the prompt's beginning is cached, unless that one is busy; affinity: a
        session stays where it is; load: the fewest requests under way; turns: each in turn.
      host: the address to listen on; keys are asked for by the servers behind.
      port: 0 picks one.
    """
    import uvicorn

    from decode.route import POLICIES, router

    wrong = [url for url in urls if not url.startswith(("http://", "https://"))]
    if not urls or wrong or len(set(urls)) != len(urls):
        raise UserError(f"route: {wrong or list(urls)}: give addresses, http://..., each once")
    uvicorn.run(router(urls, POLICIES[policy]()), host=host, port=port, log_level="warning")
