# ruff: noqa: E501 (the texts are lines of other files)
"""The mutants: one wrong line each, and the narrowest tests that must fail on it.

``old`` occurs exactly once in ``file`` (a test checks it); ``kind`` says what has to be rebuilt: nothing (python), the object
files that include the C++ file (cpu), or the kernels that the PTX simulator runs (cuda, rebuilt by the tests themselves).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # pytest arguments


F = "tests/robustness/"
ADD, BN, NMS = "tests/ops/test_add_act.py", "tests/ops/test_bn_act.py", "tests/ops/test_nms.py"
NUMERICS, HOST = "tests/ops/test_bn_act_numerics.py", "tests/test_cuda_host.py"


def _k(path: str, expression: str) -> tuple[str, ...]:
    return (path, "-k", expression)


MUTANTS: tuple[Mutant, ...] = (
    # Python: functionals, contracts, references, backend choice
    Mutant("list-autograd-needs-shifted", "python", "dl4ds_kernels/_list_autograd.py",
           "_nested(needs[1:], call.structure, False)", "_nested(needs[:-1], call.structure, False)", ("tests/test_list_autograd.py",)),
    Mutant("relu-drops-nan", "python", "dl4ds_kernels/_activation.py", "        return torch.relu(z)\n",
           "        return torch.where(z > 0, z, torch.zeros_like(z))\n", _k(F + "test_numeric_faults.py", "F14 and reference")),
    Mutant("running-mean-not-updated", "python", "dl4ds_kernels/functional/bn_act.py",
           "            running_mean.copy_(new_mean)\n", "            pass\n", _k(F + "test_numeric_faults.py", "F09 and functional")),
    Mutant("gradient-weight-and-bias-swapped", "python", "dl4ds_kernels/ops/bn_act.py",
           "        grads[1] = dweight.to(weight.dtype)\n", "        grads[1] = dbias.to(weight.dtype)\n",
           _k(F + "test_autograd_faults.py", "F43 and gradcheck and bn_act")),
    Mutant("unneeded-gradient-for-residual", "python", "dl4ds_kernels/ops/add_act.py",
           "dx if need_residual else None", "None", _k(F + "test_autograd_faults.py", "F43 and gradcheck and add_act")),
    Mutant("second-backward-silently-wrong", "python", "dl4ds_kernels/_define.py",
           '    raise RuntimeError(f"{name.removesuffix(\'_bwd\')}: expected a first-order gradient, got a second backward (create_graph)")\n',
           "    return tuple(torch.zeros_like(a) for a in grads)\n", _k(F + "test_autograd_faults.py", "F44 and second")),
    Mutant("forward-mode-silently-zero", "python", "dl4ds_kernels/functional/_common.py",
           "    if forward_ad._current_level >= 0:\n", "    if False:\n", _k(F + "test_autograd_faults.py", "F44 and forward")),
    Mutant("fake-has-nchw-strides", "python", "dl4ds_kernels/ops/_layout.py",
           "        return torch.channels_last\n", "        return torch.contiguous_format\n",
           _k(F + "test_layout_faults.py", "F21 and fake")),
    Mutant("one-value-per-channel-accepted", "python", "dl4ds_kernels/functional/bn_act.py",
           "        if training and x.numel() == x.shape[1]:\n", "        if training and x.numel() < 0:\n",
           _k(F + "test_input_faults.py", "F08")),
    Mutant("eps-std-is-var", "python", "dl4ds_kernels/functional/_common.py", '        fail(op, "eps_mode", "\'var\' or \'std\'", repr(eps_mode), ValueError)\n    return True\n',
           '        fail(op, "eps_mode", "\'var\' or \'std\'", repr(eps_mode), ValueError)\n    return False\n', _k(BN, "eps_std")),
    Mutant("reference-nms-keeps-at-equality", "python", "dl4ds_kernels/reference/nms.py",
           "        stays = ~(iou.double() > iou_threshold)\n", "        stays = ~(iou.double() >= iou_threshold)\n",
           _k(F + "test_nms_faults.py", "F38 and reference")),
    Mutant("reference-nms-float32-threshold", "python", "dl4ds_kernels/reference/nms.py",
           "        stays = ~(iou.double() > iou_threshold)\n", "        stays = ~(iou > torch.tensor(iou_threshold).to(iou))\n",
           _k(F + "test_nms_faults.py", "F38 and reference")),
    Mutant("reference-nms-ascending", "python", "dl4ds_kernels/reference/nms.py",
           "    undecided = scores.sort(stable=True, descending=True)[1]\n", "    undecided = scores.sort(stable=True)[1]\n",
           _k(F + "test_nms_faults.py", "reference")),
    Mutant("stale-packed-weights", "python", "dl4ds_kernels/_packing.py",
           "        holder.version != weight._version\n", "        False\n", ("tests/test_packing.py", "tests/convert/test_staleness.py")),
    Mutant("old-gpu-gets-the-kernels", "python", "dl4ds_kernels/_extension.py",
           "        if ptx and not specific and capability >= (major, minor):\n", "        if ptx:\n",
           _k(F + "test_install_faults.py", "F53")),
    Mutant("torn-file-is-loaded", "python", "dl4ds_kernels/_extension.py",
           "    if table + entry * count > path.stat().st_size:\n", "    if False:\n",
           _k(F + "test_install_faults.py", "F52 and torn and (4096 or 0.5)")),
    Mutant("pickled-weights-are-loaded", "python", "dl4ds_kernels/cli/_model.py",
           'torch.load(path, map_location="cpu", weights_only=True)', 'torch.load(path, map_location="cpu", weights_only=False)',
           _k(F + "test_install_faults.py", "F54 and pickle")),
    Mutant("recording-ignores-the-modules", "python", "dl4ds_kernels/modules/_replay.py",
           "    if not host.module_unchanged(module, known.snapshot):\n        known.tapes, known.seen", "    if False:\n        known.tapes, known.seen",
           ("tests/modules/test_replay.py",)),
    Mutant("recording-keeps-old-packs", "python", "dl4ds_kernels/modules/_tape.py",
           '            packed = _packing.kept(conv, conv._parameters["weight"], algorithm)\n', "            packed = _packing.packs(conv).get(algorithm)\n",
           ("tests/modules/test_replay.py",)),
    Mutant("chain-forgets-its-registers", "python", "dl4ds_kernels/modules/_chain.py",
           "        note((sources, residual))\n", "        note(None)\n", ("tests/modules/test_replay.py",)),
    # C++ on the CPU
    Mutant("cpu-add-output-off-by-1e-3", "cpu", "csrc/ops/add_act/add_act_kernels_cpu.h",
           "    z *= static_cast<T>(p.alpha);\n", "    z = z * static_cast<T>(p.alpha) + static_cast<T>(1e-3);\n", _k(ADD, "cpu and fp32")),
    Mutant("cpu-add-tail-is-missing", "cpu", "csrc/ops/add_act/add_act_kernels_cpu.h",
           "    if (i < p.n) {\n        add_act_lanes<scalar_t, kAct, true>(p, i, p.n - i, false, bits);\n",
           "    if (false && i < p.n) {\n        add_act_lanes<scalar_t, kAct, true>(p, i, p.n - i, false, bits);\n", _k(ADD, "cpu and fp32")),
    Mutant("cpu-add-gradient-tail-is-missing", "cpu", "csrc/ops/add_act/add_act_kernels_cpu.h",
           "    if (i < p.n) {\n        add_act_bwd_lanes<scalar_t, kAct, true>(p, i, p.n - i, false);\n",
           "    if (false && i < p.n) {\n        add_act_bwd_lanes<scalar_t, kAct, true>(p, i, p.n - i, false);\n", _k(ADD, "cpu and fp32")),
    Mutant("cpu-bn-chan-merge-without-delta", "cpu", "csrc/ops/bn_act/bn_act_stats_kernels_cpu.h",
           "    m2 += m2_b + delta * delta * (count * count_b / total);\n", "    m2 += m2_b;\n",
           (F + "test_numeric_faults.py", "tests/ops/test_bn_act_numerics.py", "-k", "cpu")),
    Mutant("cpu-bn-statistics-unshifted", "cpu", "csrc/ops/bn_act/bn_act_stats_kernels_cpu.h",
           "        store(shift + i, s * factor);\n", "        store(shift + i, s * T(0));\n",
           (F + "test_numeric_faults.py", "tests/ops/test_bn_act_numerics.py", "-k", "cpu")),
    Mutant("cpu-bn-gradient-wrong-sum", "cpu", "csrc/ops/bn_act/bn_act_bwd_kernels_cpu.h",
           "        store(sum1 + i, s1);\n        store(sum2 + i, s2);\n", "        store(sum1 + i, s1);\n        store(sum2 + i, s1);\n",
           _k(BN, "cpu and backward and nhwc")),
    Mutant("cpu-bn-gradient-tail-not-masked", "cpu", "csrc/ops/bn_act/bn_act_bwd_kernels_cpu.h",
           "                v.dz = keep_first<T>(v.dz, p.len - i);\n", "                v.dz = keep_first<T>(v.dz, W);\n",
           _k(NUMERICS, "lanes_past")),
    Mutant("cpu-nms-equality-suppresses", "cpu", "csrc/ops/nms/nms_kernels_cpu.h",
           "            found &= to_bits<T>(inter / uni > q.threshold);\n", "            found &= to_bits<T>(inter / uni >= q.threshold);\n",
           _k(F + "test_nms_faults.py", "F38 and cpu")),
    Mutant("cpu-nms-wrong-child", "cpu", "csrc/ops/nms/nms_kernels_cpu.h",
           "        const Mask<T> y = (load(b.y_max + k) > q.y_low) & (load(b.y_min + k) < q.y_high);\n",
           "        const Mask<T> y = (load(b.y_max + k) > q.y_high) & (load(b.y_min + k) < q.y_high);\n", _k(NMS, "not full")),
    Mutant("cpu-nms-threshold-rounded-up", "cpu", "csrc/ops/nms/nms_solve.h",
           "std::nextafter(nearest, -std::numeric_limits<T>::infinity())", "nearest", _k(F + "test_nms_faults.py", "F38 and cpu")),
    Mutant("cpu-winograd-f6-has-other-points", "cpu", "csrc/ops/conv_bn_act/conv_winograd_kernels_cpu.h",
           "kA = 0.5625f, kB = 1.0f, kC = 2.0f;", "kA = 0.5f, kB = 1.0f, kC = 2.0f;", ("tests/ops/test_conv_engine.py", "-m", "not slow")),
    Mutant("cpu-parts-overlap", "cpu", "csrc/ops/conv_bn_act/conv_transformed_cpu.cpp",
           "            v += part.channels / kChunk * v_chunk;\n", "            v += v_chunk;\n", ("tests/convert/test_concat.py",)),
    Mutant("cpu-pool-keeps-blocks-in-use", "cpu", "csrc/common/cpu/pool_cpu.cpp",
           "        free_.erase(range);\n        if (left > 0) {\n", "        if (left > 0) {\n", ("tests/test_pool.py",)),
    Mutant("cpu-pool-melts-strangers", "cpu", "csrc/common/cpu/pool_cpu.cpp",
           "            if (before->first + before->second == data) {\n", "            {\n", ("tests/test_pool.py",)),
    Mutant("cpu-pool-locked-in-the-child", "cpu", "csrc/common/cpu/pool_cpu.cpp",
           "        pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); },\n                       [] { get().mutex_.unlock(); });\n",
           "        pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, nullptr);\n",
           _k(F + "test_process_faults.py", "F50_fork")),
    Mutant("cpu-out-of-memory-is-counted-as-used", "cpu", "csrc/common/cpu/pool_cpu.cpp",
           "            if (data != nullptr) {\n                used_ +=", "            {\n                used_ +=",
           _k(F + "test_memory_faults.py", "F26")),
    Mutant("normed-conv-mean-not-subtracted", "cpu", "csrc/ops/conv_bn_act/conv_gemm_kernels_cpu.h",
           "                value -= mean;\n", "                value += mean;\n", _k("tests/ops/test_dense_layer.py", "normed_convolution")),
    Mutant("normed-conv-sum-of-products-wrong", "cpu", "csrc/ops/conv_bn_act/conv_back_kernels_cpu.h",
           "        product += dz * centered;\n", "        product += dz * z;\n", _k("tests/ops/test_dense_layer.py", "normed_convolution")),
    Mutant("dense-layers-start-from-the-first-gradient", "cpu", "csrc/ops/conv_bn_act/conv_dense_layer_cpu.cpp",
           "        const Tensor& before = i == 0 ? total : grad;\n", "        const Tensor& before = total;\n", _k("tests/ops/test_dense_layer.py", "in_one_call")),
    Mutant("residual-step-shortcut-gradient-missing", "cpu", "csrc/ops/conv_bn_act/conv_block_cpu.cpp",
           "i == 0 && added ? &*added : nullptr", "i != 0 && added ? &*added : nullptr", _k("tests/ops/test_residual_step.py", "step_by_step")),
    Mutant("residual-step-library-inside-a-team", "cpu", "csrc/ops/conv_bn_act/conv_train_cpu.cpp",
           "    if (Team::current() != nullptr) {\n        throw NeedsPool();\n", "    if (false) {\n        throw NeedsPool();\n", _k("tests/ops/test_residual_step.py", "not_finite")),
    Mutant("wgrad-first-part-twice", "cpu", "csrc/ops/conv_bn_act/conv_wgrad_direct_cpu.cpp",
           "            from += plan.sums();\n", "            from += part > 1 ? plan.sums() : 0;\n", _k("tests/ops/test_conv2d_step.py", "error_is")),
    # CUDA kernels, run on the PTX simulator
    Mutant("cuda-add-mask-tail", "cuda", "csrc/ops/add_act/add_act_kernel.cuh",
           "            const bool valid = f < vecs;\n", "            const bool valid = f + 1 < vecs;\n", _k(HOST, "against_cpu")),
    Mutant("cuda-add-alpha-missing-in-gradient", "cuda", "csrc/ops/add_act/add_act_kernel.cuh",
           "            dz[k] *= alpha;\n", "            dz[k] *= acc_t(1);\n", _k(HOST, "against_cpu")),
    Mutant("cuda-bn-shift-sign", "cuda", "csrc/ops/bn_act/bn_act_kernel.cuh",
           "        shift[k] = fma(-mean[k], scale[k], shift[k]);\n", "        shift[k] = fma(mean[k], scale[k], shift[k]);\n", _k(HOST, "against_cpu")),
    Mutant("cuda-bn-eps-std-ignored", "cuda", "csrc/ops/bn_act/bn_act_kernel.cuh",
           "a.eps_std ? acc_t(1) / (root(scale[k]) + eps) : acc_t(1) / root(scale[k] + eps)", "acc_t(1) / root(scale[k] + eps)",
           ("tests/test_cuda_kernels.py", "-k", "bn_act", "-m", "not full")),
    Mutant("cuda-bn-cursor-carries-wrong", "cuda", "csrc/ops/bn_act/bn_act_kernel.cuh",
           "            c += static_cast<int>(planes.channels);\n            --n;\n", "            c += static_cast<int>(planes.channels);\n",
           _k("tests/test_cuda_kernels.py", "several_steps")),
    Mutant("cuda-reduce-barrier-missing", "cuda", "csrc/common/cuda/reduce.cuh",
           "            write(group, channel, state);\n        }\n        __syncthreads();\n", "            write(group, channel, state);\n        }\n",
           _k(HOST, "against_cpu")),
    Mutant("cuda-sum-merges-one-field", "cuda", "csrc/common/cuda/reduce.cuh",
           "        v[1] += other.v[1];\n", "        v[1] += other.v[0];\n", _k(HOST, "against_cpu")),
    Mutant("cuda-nms-equality-suppresses", "cuda", "csrc/ops/nms/nms_iou.cuh",
           "    return Rule::quotient(o) > acc_t(threshold);\n", "    return Rule::quotient(o) >= acc_t(threshold);\n",
           ("tests/ops/test_nms_cuda.py", "-m", "not full")),
    Mutant("cuda-nms-zero-area-suppresses", "cuda", "csrc/ops/nms/nms_iou.cuh",
           "    if (o.inter == 0 && threshold >= 0) {\n        return false;", "    if (o.inter == 0 && threshold >= 0) {\n        return true;",
           ("tests/ops/test_nms_cuda.py", "-m", "not full")),
)  # fmt: skip
