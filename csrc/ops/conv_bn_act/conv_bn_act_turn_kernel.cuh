// The filter of a convolution as its input's gradient reads it: rows and columns in reverse order, input and
// output channels exchanged.
#pragma once

#include <cstdint>

namespace dl4ds {

constexpr int kTurnTile = 32;  // channels of either kind that a block exchanges

struct ConvTurnArgs {
    const void* filter;
    int64_t stride_out, stride_in, stride_h, stride_w;
    int channels_out, channels_in, height, width;  // of the filter
    int out_tiles, in_tiles;
    void* turned;  // dense (channels_in, height, width, channels_out)
};

/// Grid: tiles of output channels, of input channels, taps. 32 x 8 threads; both sides of the exchange move
/// neighbouring channels with neighbouring threads, where the filter is channels last.
template <typename T>
__global__ void __launch_bounds__(256) conv_bn_act_turn_kernel(const ConvTurnArgs a) {
    __shared__ T tile[kTurnTile][kTurnTile + 1];
    const int x = threadIdx.x % kTurnTile, y = threadIdx.x / kTurnTile;
    const int out_first = blockIdx.x % a.out_tiles * kTurnTile, rest = blockIdx.x / a.out_tiles;
    const int in_first = rest % a.in_tiles * kTurnTile, tap = rest / a.in_tiles;
    const int h = tap / a.width, w = tap % a.width;
    const T* from = static_cast<const T*>(a.filter) + h * a.stride_h + w * a.stride_w;
#pragma unroll
    for (int i = y; i < kTurnTile; i += 8) {
        const int out = out_first + i, in = in_first + x;
        if (out < a.channels_out && in < a.channels_in) {
            tile[i][x] = from[out * a.stride_out + in * a.stride_in];
        }
    }
    __syncthreads();
    T* to = static_cast<T*>(a.turned);
    const int taps = a.height * a.width, mirrored = taps - 1 - tap;
#pragma unroll
    for (int i = y; i < kTurnTile; i += 8) {
        const int out = out_first + x, in = in_first + i;
        if (out < a.channels_out && in < a.channels_in) {
            to[(static_cast<int64_t>(in) * taps + mirrored) * a.channels_out + out] = tile[x][i];
        }
    }
}

}  // namespace dl4ds
