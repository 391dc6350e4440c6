"""Every Triton kernel compiled without a GPU: hardly any stack, shared memory within the limit, int64 offsets, tensor cores where meant."""

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.timeout(1200)

MODULES = (
    "memory_read", "memory_write", "content_address", "content_read", "lstm_gates", "lstm", "gru_gates", "gru", "rnn", "attention",
    "segment_attention", "merge_attention", "attention_varlen", "paged_attention", "retrieval_attention", "quantized_attention",
    "location_address", "usage", "allocation", "link_step", "link_read", "weighted_bag", "hopfield_retrieve", "topk_read",
    "product_key_search", "ntm_sequence", "dnc_sequence",
)  # fmt: skip
QUICK = {
    "memory_read_bwd_fp32",
    "memory_write_fwd_fp32",
    "memory_write_bwd_bf16",
    "content_read_fwd_cosine_fp32",
    "content_read_bwd_cosine_bf16",
    "content_read_bwd_dot_R64_bf16",
    "content_read_bwd_dot_R128_bf16",
    "lstm_gates_bwd_fp32",
    "lstm_fwd_H64_fp32",
    "lstm_bwd_H64_bf16",
    "lstm_bwd_H128_bf16",
    "gru_fwd_H64_bf16",
    "rnn_bwd_H512_fp32",
    "attention_fwd_D64_causal_bf16",
    "attention_fwd_D64_causal_every_bf16",
    "attention_fwd_D64_causal_tma90_bf16",
    "attention_fwd_D64_tma100_bf16",
    "attention_dkey_D64_bf16",
    "attention_dquery_D64_causal_bf16",
    "segment_attention_fwd_fp32",
    "segment_attention_bwd_sources_bf16",
    "merge_attention_bwd_bf16",
    "attention_varlen_forward_D64_causal_bf16",
    "attention_varlen_dquery_D64_bf16",
    "attention_varlen_dkey_D64_causal_bf16",
    "paged_attention_forward_bf16",
    "paged_attention_dquery_causal_fp32",
    "paged_attention_dkey_bf16",
    "retrieval_fwd_bias_bf16",
    "retrieval_bwd_bias_fp32",
    "retrieval_memory_bf16",
    "quantized_attention_fwd_bf16",
    "quantized_attention_bwd_fp32",
    "quantized_attention_fwd_M32_D128_fp32",
    "usage_bwd_fp32",
    "allocation_bwd_fp32",
    "link_step_fwd_fp32",
    "link_step_bwd_bf16",
    "link_read_bwd_fp32",
    "weighted_bag_bwd_table_bf16",
    "hopfield_fwd_bf16",
    "topk_search_bf16",
    "topk_gradient_cosine_fp32",
    "product_key_search_bf16",
    "ntm_sequence_graves_fwd_fp32",
    "ntm_sequence_pytorch-ntm_bwd_bf16",
    "dnc_sequence_plain_fwd_fp32",
}


@cache
def entries(module):
    return {entry.name: entry.capabilities for entry in importlib.import_module(f"memkernels.backends.triton.{module}").AOT}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What a kernel uses, by a process of its own (one that runs the interpreter has no kernels to compile) that compiles one at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root, errors = Path(__file__).parent, tmp_path_factory.mktemp("aot") / "errors"
    environment["PYTHONPATH"] = os.pathsep.join([str(root.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", root / "triton_aot.py"]
    with (
        open(errors, "w") as file,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment) as process,
    ):

        def report(module, name, capability):
            print(f"{module}:{name}:{capability}", file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, f"{name} for sm_{capability}: {errors.read_text()[-3000:]}"
            return json.loads(answer)

        yield report
        process.stdin.close()


def check(report):
    name = f"{report['kernel']} for sm_{report['sm']}"
    assert report["stack"] <= report["stack_limit"], f"{name} spills {report['stack']} bytes with {report['registers']} registers"
    assert report["shared"] <= report["shared_limit"], f"{name} needs {report['shared']} bytes of shared memory"
    assert not report["narrow_offsets"], f"{name} adds an offset that is not int64: {report['narrow_offsets'][0]}"
    assert not report["contracted"], f"{name} leaves it to ptxas whether a product and a sum are rounded once or twice"
    missing = set(report["expect"]) - set(report["found"])
    assert not missing, f"{name} has no {', '.join(sorted(missing))}, only {report['found']}"


@pytest.mark.parametrize("name", sorted(QUICK))
def test_resources(compiled, name):
    (module,) = (module for module in MODULES if name in entries(module))
    check(compiled(module, name, max(90, min(entries(module)[name]))))


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_resources_of_every_kernel(compiled, module):
    for name, capabilities in entries(module).items():
        for capability in capabilities:
            check(compiled(module, name, capability))


def test_every_module_is_covered():
    directory = Path(importlib.import_module("memkernels.backends.triton").__file__).parent
    kernels = {p.stem for p in directory.glob("*.py") if not p.stem.startswith("_")}
    assert kernels == set(MODULES)
    assert QUICK <= {name for module in MODULES for name in entries(module)}


def test_the_lint_sees_a_narrow_offset():
    from triton_aot import narrow_offsets

    wide = "%5 = tt.addptr %3, %4 : tensor<16x!tt.ptr<f32>>, tensor<16xi64> loc(#loc2)"
    assert not narrow_offsets(wide)
    assert narrow_offsets(wide.replace("xi64", "xi32"))
    assert narrow_offsets("%5 = tt.addptr %3, %c : !tt.ptr<f32>, i32 loc(#loc2)")
