/* Three windows (rows of bytes) times all outputs, with MVE: the inner part of a convolution.
 *
 * Weights, biases and factors lie in one stream in the order of their use. For every four outputs, K rounded up to steps of 16:
 *
 *     int32 bias of outputs 0, 2; for every step 16 weights of output 0 and 16 of output 2
 *     int32 bias of outputs 1, 3; for every step 16 weights of output 1 and 16 of output 3
 *     float rescale of outputs 0, 1, 2, 3
 *
 * Two outputs meet three windows, so that five loads feed six times sixteen products; the pairs 0, 2 and 1, 3 are what one
 * instruction moves into a vector of four sums.
 *
 * PLANISH_CLAMP: the codes' bounds are not those of int8. PLANISH_RAGGED: the number of outputs is no multiple of four.
 */
#ifndef PLANISH_MVE_WINDOWS_H
#define PLANISH_MVE_WINDOWS_H

#include "planish.h"

enum { WINDOWS = 3, STEP = 16 };

/* the assembly code knows the places of the members */
typedef struct {
    const int8_t *x[WINDOWS];
    int32_t size; /* K, codes of a window */
    int8_t *y[WINDOWS];
    int32_t zero_point;
    const uint32_t *stream, *end;
    int32_t low, high;
    int32_t outputs; /* that are left */
} windows_t;

#if defined(__ARM_FEATURE_MVE)

/* sums of two outputs (q3, q4) with three windows (q0 to q2) into r0, r2, r4 and r6, r8, r10, which start as the biases */
#define PRODUCTS                  \
    "ldm r12, {r1, r3, r5, r9}\n" \
    "ldrd r0, r6, [r11], #8\n"    \
    "dlstp.8 lr, r9\n"            \
    "mov r2, r0\n"                \
    "mov r4, r0\n"                \
    "mov r8, r6\n"                \
    "mov r10, r6\n"               \
    "1:\n"                        \
    "vldrb.u8 q3, [r11], #16\n"   \
    "vldrb.u8 q0, [r1], #16\n"    \
    "vmladava.s8 r0, q0, q3\n"    \
    "vldrb.u8 q1, [r3], #16\n"    \
    "vmladava.s8 r2, q1, q3\n"    \
    "vldrb.u8 q2, [r5], #16\n"    \
    "vmladava.s8 r4, q2, q3\n"    \
    "vldrb.u8 q4, [r11], #16\n"   \
    "vmladava.s8 r6, q0, q4\n"    \
    "vmladava.s8 r8, q1, q4\n"    \
    "vmladava.s8 r10, q2, q4\n"   \
    "letp lr, 1b\n"

#ifdef PLANISH_CLAMP
#define BOUNDS              \
    "ldrd r0, r2, [r12, #40]\n" \
    "vdup.32 q1, r0\n"      \
    "vdup.32 q2, r2\n"
#define SATURATE(q)                    \
    "vmax.s32 " q ", " q ", q1\n" \
    "vmin.s32 " q ", " q ", q2\n"
#else
#define BOUNDS ""
#define SATURATE(q)                \
    "vqmovnb.s32 " q ", " q "\n" \
    "vqmovnb.s16 " q ", " q "\n"
#endif

#ifdef PLANISH_RAGGED
#define STORES                  \
    "ldr r0, [r12, #48]\n"      \
    "vctp.32 r0\n"              \
    "subs r0, r0, #4\n"         \
    "str r0, [r12, #48]\n"      \
    "vpsttt\n"                  \
    "vstrbt.32 q5, [r1], #4\n"  \
    "vstrbt.32 q6, [r3], #4\n"  \
    "vstrbt.32 q7, [r5], #4\n"
#else
#define STORES                 \
    "vstrb.32 q5, [r1], #4\n"  \
    "vstrb.32 q6, [r3], #4\n"  \
    "vstrb.32 q7, [r5], #4\n"
#endif

#define EACH(f) f("q5") f("q6") f("q7")
#define TO_FLOAT(q) "vcvt.f32.s32 " q ", " q "\n"
#define SCALE(q) "vmul.f32 " q ", " q ", q0\n"
#define ROUND(q) "vcvtn.s32.f32 " q ", " q "\n"
#define MOVE_ZERO(q) "vqadd.s32 " q ", " q ", r9\n"

static inline void multiply_windows(windows_t *job)
{
    register windows_t *at __asm__("r12") = job;
    __asm__ volatile(
        "ldr r11, [r12, #32]\n"
        "0:\n"
        PRODUCTS
        "vmov q5[2], q5[0], r0, r6\n"
        "vmov q6[2], q6[0], r2, r8\n"
        "vmov q7[2], q7[0], r4, r10\n"
        PRODUCTS
        "vmov q5[3], q5[1], r0, r6\n"
        "vmov q6[3], q6[1], r2, r8\n"
        "vmov q7[3], q7[1], r4, r10\n"
        "vldrw.u32 q0, [r11], #16\n"
        EACH(TO_FLOAT)
        "ldrd r1, r3, [r12, #16]\n"
        EACH(SCALE)
        "ldrd r5, r9, [r12, #24]\n"
        EACH(ROUND)
        EACH(MOVE_ZERO)
        BOUNDS
        EACH(SATURATE)
        STORES
        "ldr r0, [r12, #36]\n"
        "strd r1, r3, [r12, #16]\n"
        "str r5, [r12, #24]\n"
        "cmp r11, r0\n"
        "bne 0b\n"
        : "+r"(at)
        :
        : "memory", "cc", "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r8", "r9", "r10", "r11", "lr", "q0", "q1", "q2",
          "q3", "q4", "q5", "q6", "q7");
}

#else

static inline void multiply_windows(windows_t *job)
{
    const uint32_t *stream = job->stream;
    int32_t steps = (job->size + STEP - 1) / STEP, o, i, k;
    while (stream != job->end) {
        const uint32_t *part[2];
        const float *rescale;
        part[0] = stream;
        part[1] = stream + 2 + 2 * STEP / 4 * steps;
        rescale = (const float *)(part[1] + 2 + 2 * STEP / 4 * steps);
        for (i = 0; i < WINDOWS; i++) {
            for (o = 0; o < 4 && o < job->outputs; o++) {
                const int8_t *weight = (const int8_t *)(part[o % 2] + 2) + o / 2 * STEP;
                int32_t sum = (int32_t)part[o % 2][o / 2];
                for (k = 0; k < job->size; k++) {
                    sum += job->x[i][k] * weight[k / STEP * 2 * STEP + k % STEP];
                }
                job->y[i][o] = planish_requantize(sum, rescale[o], (float)(job->low - job->zero_point),
                                                  (float)(job->high - job->zero_point), job->zero_point);
            }
            job->y[i] += 4;
        }
        job->outputs -= 4;
        stream = (const uint32_t *)(rescale + 4);
    }
}

#endif

#endif
