#include "ops/bn_act/bn_act_reduce_cpu.h"

#include <cstring>

namespace dl4ds {
namespace {

/// Fewer channels than this are cut by image as well, so that the threads have work.
constexpr int64_t kFewChannels = 16;

/// Chan's merge of (count_b, mean_b, m2_b) into (count, mean, m2).
void merge(double& count, double& mean, double& m2, double count_b, double mean_b, double m2_b) {
    const double total = count + count_b;
    const double delta = mean_b - mean;
    mean += delta * (count_b / total);
    m2 += m2_b + delta * delta * (count * count_b / total);
    count = total;
}

/// Two arrays of `entries` doubles for every block, in one piece of scratch memory.
class BlockSums {
  public:
    BlockSums(int64_t blocks, int64_t entries) : entries_(entries), memory_(2 * blocks * entries * 8) {}
    double* first(int64_t block) { return memory_.as<double>() + 2 * block * entries_; }
    double* second(int64_t block) { return first(block) + entries_; }

  private:
    int64_t entries_;
    Scratch memory_;
};

/// The blocks of the per-element layout: the rows' blocks, then one for the tail if there is one.
struct ElementBlocks {
    explicit ElementBlocks(const BnPlan& plan) : rows(row_blocks(plan)), tail(plan.tail > 0 ? 1 : 0) {}
    int64_t count() const { return rows.count + tail; }

    Blocks rows;
    int64_t tail;
};

void stats_block(const BnPlan& plan, const void* x, const ElementBlocks& blocks, int64_t block, double* mean,
                 double* m2) {
    const int64_t size = dtype_size(plan.dtype);
    const auto kernel = bn_kernels().stats[static_cast<int>(plan.dtype)][0];
    Scratch scratch(bn_stats_scratch_bytes(plan.len));
    if (block == blocks.rows.count) {
        const int64_t at = plan.rows * plan.len;
        kernel({byte_offset(x, at * size), plan.tail, plan.channels, plan.channels, mean, m2,
                scratch.as<void>()});
        return;
    }
    Scratch run_sums(2 * 8 * plan.len);
    double count = 0;
    const int64_t pitch = plan.outer_strides[plan.outer_dims - 1];
    for_each_run(
        plan, blocks.rows.begin(block), blocks.rows.end(block), [&](int64_t, int64_t rows, int64_t x_at) {
            double* run_mean = count == 0 ? mean : run_sums.as<double>();
            double* run_m2 = count == 0 ? m2 : run_mean + plan.len;
            kernel(
                {byte_offset(x, x_at * size), rows, plan.len, pitch, run_mean, run_m2, scratch.as<void>()});
            const double added = static_cast<double>(rows);
            if (count > 0) {
                for (int64_t i = 0; i < plan.len; ++i) {
                    double merged = count;
                    merge(merged, mean[i], m2[i], added, run_mean[i], run_m2[i]);
                }
            }
            count += added;
        });
}

void stats_per_element(const BnPlan& plan, const void* x, double* mean, double* m2) {
    const ElementBlocks blocks(plan);
    BlockSums sums(blocks.count(), pad_elements(plan.len));
    parallel_for(blocks.count(), plan.bytes(), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            stats_block(plan, x, blocks, block, sums.first(block), sums.second(block));
        }
    });
    const int64_t merge_bytes = blocks.count() * plan.len * 16;
    parallel_for(plan.channels, merge_bytes, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            double count = 0;
            mean[c] = m2[c] = 0;
            for (int64_t block = 0; block < blocks.count(); ++block) {
                const bool is_tail = block == blocks.rows.count;
                const int64_t rows = is_tail ? plan.tail : blocks.rows.end(block) - blocks.rows.begin(block);
                for (int64_t g = 0; g < (is_tail ? 1 : plan.group); ++g) {
                    const int64_t at = g * plan.channels + c;
                    merge(count, mean[c], m2[c], static_cast<double>(rows), sums.first(block)[at],
                          sums.second(block)[at]);
                }
            }
        }
    });
}

void stats_planes(const BnPlan& plan, const void* x, int64_t n, int64_t c, double& mean, double& m2) {
    const int64_t at = (n < 0 ? 0 : n * plan.stride_n) + c * plan.stride_c;
    BnStatsArgs p{byte_offset(x, at * dtype_size(plan.dtype)),
                  plan.plane_rows,
                  plan.plane_len,
                  plan.plane_pitch,
                  &mean,
                  &m2,
                  nullptr};
    if (n < 0) {
        p.rows = plan.n;
        p.x_pitch = plan.stride_n;
    }
    bn_kernels().stats[static_cast<int>(plan.dtype)][1](p);
}

void reduce_block(const BnPlan& plan, Activation act, const BnBwdArgs& whole, const ElementBlocks& blocks,
                  int64_t block, double* s1, double* s2) {
    const auto kernel = bn_kernels().bwd_reduce[static_cast<int>(plan.dtype)][0][static_cast<int>(act)];
    std::memset(s1, 0, static_cast<size_t>(pad_elements(plan.len)) * sizeof(double));
    std::memset(s2, 0, static_cast<size_t>(pad_elements(plan.len)) * sizeof(double));
    Scratch scratch(bn_reduce_scratch_bytes(plan.len));
    const auto run = [&](BnBwdArgs p) {
        p.s1 = s1;
        p.s2 = s2;
        p.scratch = scratch.as<void>();
        kernel(p);
    };
    if (block == blocks.rows.count) {
        const int64_t at = plan.rows * plan.len;
        run(bwd_rows(plan, whole, at, at, plan.tail, plan.channels, plan.channels));
        return;
    }
    const int64_t pitch = plan.outer_strides[plan.outer_dims - 1];
    for_each_run(plan, blocks.rows.begin(block), blocks.rows.end(block),
                 [&](int64_t row, int64_t rows, int64_t x_at) {
                     run(bwd_rows(plan, whole, row * plan.len, x_at, rows, plan.len, pitch));
                 });
}

/// Of one channel, from those of all blocks.
void merge_blocks(const BnPlan& plan, const ElementBlocks& blocks, BlockSums& sums, int64_t c, double& s1,
                  double& s2) {
    s1 = s2 = 0;
    for (int64_t block = 0; block < blocks.count(); ++block) {
        const int64_t groups = block == blocks.rows.count ? 1 : plan.group;
        for (int64_t g = 0; g < groups; ++g) {
            s1 += sums.first(block)[g * plan.channels + c];
            s2 += sums.second(block)[g * plan.channels + c];
        }
    }
}

void reduce_per_element(const BnPlan& plan, Activation act, const BnBwdArgs& whole, double* s1, double* s2) {
    const ElementBlocks blocks(plan);
    BlockSums sums(blocks.count(), pad_elements(plan.len));
    parallel_for(blocks.count(), 2 * plan.bytes(), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            reduce_block(plan, act, whole, blocks, block, sums.first(block), sums.second(block));
        }
    });
    parallel_for(plan.channels, blocks.count() * plan.len * 16, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            merge_blocks(plan, blocks, sums, c, s1[c], s2[c]);
        }
    });
}

}  // namespace

void bn_stats_channel(const BnPlan& plan, const void* x, int64_t c, double& mean, double& m2) {
    if (plan.single_plane_row()) {
        stats_planes(plan, x, -1, c, mean, m2);
        return;
    }
    double count = 0;
    mean = m2 = 0;
    for (int64_t n = 0; n < plan.n; ++n) {
        double plane_mean = 0, plane_m2 = 0;
        stats_planes(plan, x, n, c, plane_mean, plane_m2);
        merge(count, mean, m2, static_cast<double>(plan.spatial), plane_mean, plane_m2);
    }
}

void bn_stats_all(const BnPlan& plan, const void* x, double* mean, double* m2) {
    if (!plan.per_row) {
        stats_per_element(plan, x, mean, m2);
        return;
    }
    if (plan.channels >= kFewChannels || plan.n == 1) {
        parallel_for(plan.channels, plan.bytes(), [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                bn_stats_channel(plan, x, c, mean[c], m2[c]);
            }
        });
        return;
    }
    BlockSums sums(plan.n, plan.channels);
    parallel_for(plan.n, plan.bytes(), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            for (int64_t c = 0; c < plan.channels; ++c) {
                stats_planes(plan, x, n, c, sums.first(n)[c], sums.second(n)[c]);
            }
        }
    });
    for (int64_t c = 0; c < plan.channels; ++c) {
        double count = 0;
        mean[c] = m2[c] = 0;
        for (int64_t n = 0; n < plan.n; ++n) {
            merge(count, mean[c], m2[c], static_cast<double>(plan.spatial), sums.first(n)[c],
                  sums.second(n)[c]);
        }
    }
}

BnBwdArgs bwd_rows(const BnPlan& plan, const BnBwdArgs& whole, int64_t element, int64_t x_offset,
                   int64_t count, int64_t len, int64_t x_pitch) {
    const int64_t size = dtype_size(plan.dtype);
    BnBwdArgs p = whole;
    p.dout = byte_offset(whole.dout, element * size);
    p.x = byte_offset(whole.x, x_offset * size);
    p.residual = byte_offset(whole.residual, element * size);
    p.dx = byte_offset(whole.dx, element * size);
    p.dresidual = byte_offset(whole.dresidual, element * size);
    p.mask_bit = element;
    p.rows = count;
    p.len = len;
    p.x_pitch = x_pitch;
    p.pitch = len;
    return p;
}

BnBwdArgs bwd_planes(const BnPlan& plan, const BnBwdArgs& whole, int64_t n, int64_t c) {
    const int64_t acc_size = dtype_size(acc_dtype(plan.dtype));
    const int64_t image = n < 0 ? 0 : n;
    BnBwdArgs p = bwd_rows(plan, whole, (image * plan.channels + c) * plan.spatial,
                           image * plan.stride_n + c * plan.stride_c, plan.plane_rows, plan.plane_len,
                           plan.plane_pitch);
    if (n < 0) {
        p.rows = plan.n;
        p.x_pitch = plan.stride_n;
        p.pitch = plan.channels * plan.spatial;
    }
    p.mean = byte_offset(whole.mean, c * acc_size);
    p.scale = byte_offset(whole.scale, c * acc_size);
    p.shift = byte_offset(whole.shift, c * acc_size);
    p.factor_x = byte_offset(whole.factor_x, c * acc_size);
    p.offset = byte_offset(whole.offset, c * acc_size);
    return p;
}

void bn_bwd_reduce_channel(const BnPlan& plan, Activation act, const BnBwdArgs& whole, int64_t c, double& s1,
                           double& s2) {
    s1 = s2 = 0;
    const auto kernel = bn_kernels().bwd_reduce[static_cast<int>(plan.dtype)][1][static_cast<int>(act)];
    const auto run = [&](int64_t n) {
        BnBwdArgs p = bwd_planes(plan, whole, n, c);
        p.s1 = &s1;
        p.s2 = &s2;
        kernel(p);
    };
    if (plan.single_plane_row()) {
        run(-1);
        return;
    }
    for (int64_t n = 0; n < plan.n; ++n) {
        run(n);
    }
}

void bn_bwd_reduce_all(const BnPlan& plan, Activation act, const BnBwdArgs& whole, double* s1, double* s2) {
    if (!plan.per_row) {
        reduce_per_element(plan, act, whole, s1, s2);
        return;
    }
    if (plan.channels >= kFewChannels || plan.n == 1) {
        parallel_for(plan.channels, 2 * plan.bytes(), [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                bn_bwd_reduce_channel(plan, act, whole, c, s1[c], s2[c]);
            }
        });
        return;
    }
    BlockSums sums(plan.n, plan.channels);
    const auto kernel = bn_kernels().bwd_reduce[static_cast<int>(plan.dtype)][1][static_cast<int>(act)];
    parallel_for(plan.n, 2 * plan.bytes(), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            for (int64_t c = 0; c < plan.channels; ++c) {
                BnBwdArgs p = bwd_planes(plan, whole, n, c);
                p.s1 = sums.first(n) + c;
                p.s2 = sums.second(n) + c;
                *p.s1 = *p.s2 = 0;
                kernel(p);
            }
        }
    });
    for (int64_t c = 0; c < plan.channels; ++c) {
        s1[c] = s2[c] = 0;
        for (int64_t n = 0; n < plan.n; ++n) {
            s1[c] += sums.first(n)[c];
            s2[c] += sums.second(n)[c];
        }
    }
}

void bn_bwd_reduce_both(const BnPlan& plan, Activation act, const BnBwdArgs* first, const BnBwdArgs& second,
                        double* s1, double* first_s2, double* second_s2) {
    if (first == nullptr || plan.per_row) {
        if (first != nullptr) {
            bn_bwd_reduce_all(plan, act, *first, s1, first_s2);
        }
        bn_bwd_reduce_all(plan, act, second, s1, second_s2);
        return;
    }
    const ElementBlocks blocks(plan);
    BlockSums sums(blocks.count(), pad_elements(plan.len)), more(blocks.count(), pad_elements(plan.len));
    parallel_for(blocks.count(), 3 * plan.bytes(), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            reduce_block(plan, act, *first, blocks, block, sums.first(block), sums.second(block));
            reduce_block(plan, act, second, blocks, block, more.first(block), more.second(block));
        }
    });
    parallel_for(plan.channels, blocks.count() * plan.len * 32, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            merge_blocks(plan, blocks, sums, c, s1[c], first_s2[c]);
            merge_blocks(plan, blocks, more, c, s1[c], second_s2[c]);
        }
    });
}

}  // namespace dl4ds
