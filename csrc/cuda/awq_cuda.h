// The C interface of the CUDA kernels, which awq_ext/kernels/cuda calls through ctypes. What each function computes is
// said in awq_ext/kernels/reference, layouts in base/layout.h.
//
// Every argument is a pointer or a 64-bit integer. Pointers are to contiguous memory of the device, aligned to 16 bytes
// where a comment says so; an optional one may be null. `stream` is a cudaStream_t: functions only launch kernels on
// it, they neither allocate nor wait, so a CUDA graph may capture them. A `type` is 0 for fp32, 1 for fp16, 2 for bf16.
// Functions return 0 or the CUDA error of the launch. Callers check all shapes.
#pragma once

#include <cstdint>

#define AWQ_CUDA_API extern "C" __attribute__((visibility("default")))

// Raised whenever a function or an argument is added or changes its meaning, so that a library of another version is
// not called.
AWQ_CUDA_API int64_t awq_cuda_version();
// 0, or the error of looking up a kernel on the current device: a driver too old for the CUDA runtime in this library,
// or a device for which it holds no code.
AWQ_CUDA_API int64_t awq_cuda_usable();
// The text of a CUDA error.
AWQ_CUDA_API const char* awq_cuda_error(int64_t error);

// --- linear.cu: codes, scales and zeros are a tiled weight, aligned to 16 bytes; group is the length of a full group
// --

// out [rows, pitch] of x's type, fp16 or bf16: x [rows, k] times scale fp32 [k] (optional), each group padded with
// zeros to whole steps of 4 channels, and the row to `pitch`, a multiple of 8.
AWQ_CUDA_API int64_t awq_cuda_arrange(void* stream, const void* x, int64_t type, const void* scale, int64_t rows,
                                      int64_t k, int64_t group, int64_t pitch, void* out);
// y [rows, n] of x's type, fp16 or bf16: x W^T + bias. x [rows, pitch], aligned to 16 bytes, as awq_cuda_arrange makes
// it or where that would change nothing: pitch = k, a multiple of 8, group a multiple of 4 or all of k. bias: optional.
AWQ_CUDA_API int64_t awq_cuda_linear(void* stream, const void* x, int64_t type, int64_t rows, int64_t pitch,
                                     const void* codes, const void* scales, int64_t scale_type, const void* zeros,
                                     const void* bias, int64_t bias_type, int64_t n, int64_t k, int64_t group,
                                     int64_t bits, void* parts, void* y);
// What it needs as `parts`, on the current device: room for fp32 [result, rows, n] where that is more than 1.
AWQ_CUDA_API int64_t awq_cuda_linear_parts(int64_t rows, int64_t n, int64_t k, int64_t group);
// 1 where awq_cuda_linear multiplies so many rows by wgmma, of a weight with one group a row or groups of multiples of
// 32 channels: more than 16, on a current device of compute capability 9.x for which this library holds code for
// sm_90a, unless AWQ_EXT_CUDA_WGMMA=0 is in the environment. Else 0.
AWQ_CUDA_API int64_t awq_cuda_wgmma(int64_t rows);
// 1 where linear_few.h would multiply so many rows by such a weight, if wgmma does not: up to 32 rows, groups of
// multiples of 32 channels, unless AWQ_EXT_CUDA_FEW=0 is in the environment. Else 0.
AWQ_CUDA_API int64_t awq_cuda_few(int64_t rows, int64_t n, int64_t k, int64_t group);
// The same for x fp32 [rows, k], with fp32 products.
AWQ_CUDA_API int64_t awq_cuda_linear_f32(void* stream, const void* x, int64_t rows, const void* codes,
                                         const void* scales, int64_t scale_type, const void* zeros, const void* bias,
                                         int64_t bias_type, int64_t n, int64_t k, int64_t group, int64_t bits, void* y);
// out [n, k] of `type`: the weight, rounded once where the type is not fp32.
AWQ_CUDA_API int64_t awq_cuda_weight(void* stream, const void* codes, const void* scales, int64_t scale_type,
                                     const void* zeros, int64_t n, int64_t k, int64_t group, int64_t bits, int64_t type,
                                     void* out);

// --- quantize.cu -----------------------------------------------------------------------------------------------------

// Rounds weight [n, k]: codes uint8 [n, k], scales [n, G] of scale_type, zeros uint8 [n, G]; all three null where only
// `error` fp32 is wanted, value / channel_scale - weight: [n, k], or with by_group [G, n, group], a short last group
// padded with 0. channel_scale fp32 [k], clip fp32 [n, G], error: optional.
AWQ_CUDA_API int64_t awq_cuda_round(void* stream, const void* weight, int64_t type, int64_t n, int64_t k, int64_t group,
                                    int64_t bits, int64_t symmetric, int64_t scale_type, const void* channel_scale,
                                    const void* clip, void* codes, void* scales, void* zeros, void* error,
                                    int64_t by_group);
// out fp32 [n, k]: (code - zero) * scale / channel_scale * divisor - weight, the last three optional.
AWQ_CUDA_API int64_t awq_cuda_dequantize(void* stream, const void* codes, const void* scales, int64_t scale_type,
                                         const void* zeros, int64_t n, int64_t k, int64_t group, const void* weight,
                                         int64_t type, const void* channel_scale, const void* divisor, void* out);

// --- pack.cu: rows are [n, ceil(k / 2)] for 4 bits and [n, k] for 8 -------------------------------------------------

AWQ_CUDA_API int64_t awq_cuda_pack(void* stream, const void* codes, int64_t n, int64_t k, void* packed);
AWQ_CUDA_API int64_t awq_cuda_unpack(void* stream, const void* packed, int64_t n, int64_t k, void* codes);
// tiles: aligned to 4 bytes.
AWQ_CUDA_API int64_t awq_cuda_tile(void* stream, const void* rows, int64_t n, int64_t k, int64_t group, int64_t bits,
                                   void* tiles);
AWQ_CUDA_API int64_t awq_cuda_untile(void* stream, const void* tiles, int64_t n, int64_t k, int64_t group, int64_t bits,
                                     void* rows);

// --- stats.cu --------------------------------------------------------------------------------------------------------

// Chunks in which so many rows are summed.
AWQ_CUDA_API int64_t awq_cuda_chunks(int64_t rows);
// Adds to sum fp64 [k] the sum of w x and to abs_sum fp64 [k] that of sqrt(w) |x|, over the rows of x [rows, k] whose
// mask is not 0. weights fp32 [rows], mask uint8 [rows]: optional. kept fp32 [rows, k], optional: sqrt(w) x, 0 in other
// rows. parts: room for fp64 [2, chunks, k].
AWQ_CUDA_API int64_t awq_cuda_sum_rows(void* stream, const void* x, int64_t type, int64_t rows, int64_t k,
                                       const void* weights, const void* mask, void* parts, void* sum, void* abs_sum,
                                       void* kept);

// --- search.cu -------------------------------------------------------------------------------------------------------

// loss fp64 [n]: sum of product * error, both fp32 [n, k]; own fp64 [n], with diagonal fp32 [k] (both optional): sum of
// error^2 * diagonal.
AWQ_CUDA_API int64_t awq_cuda_forms(void* stream, const void* product, const void* error, const void* diagonal,
                                    int64_t n, int64_t k, void* loss, void* own);
// For product and error fp32 [groups, n, group]: where their sum of products is below best fp64 [n, groups], it is put
// there, and *ratio (fp32, on the device) into chosen fp32 [n, groups].
AWQ_CUDA_API int64_t awq_cuda_better_range(void* stream, const void* product, const void* error, int64_t n,
                                           int64_t group, int64_t groups, const void* ratio, void* best, void* chosen);

// --- descent.cu: weight fp32 [n, k] times the channel scale, steps fp32 [n, G], zeros uint8 [n, G], codes uint8 [n, k]
// -

// Rounds `count` <= 32 channels from place `first` on, in turn. sums fp32 [n, count]: of e_i M_ij over all places i
// outside; matrix fp32, rows `pitch` apart: M within; order int64 [k], optional; error fp32 [n, k], by place.
AWQ_CUDA_API int64_t awq_cuda_panel(void* stream, const void* sums, const void* matrix, int64_t pitch,
                                    const void* weight, const void* order, const void* steps, const void* zeros,
                                    int64_t n, int64_t k, int64_t group, int64_t first, int64_t count, int64_t bits,
                                    void* error, void* codes);
// levels fp32 [n, channels of group `at`]: code - zero.
AWQ_CUDA_API int64_t awq_cuda_levels(void* stream, const void* codes, const void* zeros, int64_t n, int64_t k,
                                     int64_t group, int64_t at, void* levels);
// Sets the step of group `at` to its best value, and error fp32 [n, k] accordingly. pull, size fp32 [n, channels of the
// group]: error times H, and levels times H within the group.
AWQ_CUDA_API int64_t awq_cuda_move_step(void* stream, const void* weight, const void* codes, const void* zeros,
                                        int64_t n, int64_t k, int64_t group, int64_t at, int64_t scale_type,
                                        const void* pull, const void* size, void* steps, void* error);
