/* Short windows times all outputs, with MVE: the windows stay in vector registers. The same calls as mve/windows.h.
 *
 * PLANISH_STEPS 1: four windows of up to 16 codes. A vector of sums holds one output of the four windows, so that bias and rescale are
 *     scalars, and narrowing four such vectors leaves four outputs of a window side by side, a word to store for each.
 *     Stream, for every four outputs: 16 weights of output 0, and of 2; bias and rescale of 0, and of 2; the same of 1 and 3.
 * PLANISH_STEPS 2: two windows of up to 32 codes. A vector of sums holds four outputs of one window.
 *     Stream, for every four outputs: 32 weights of outputs 0, 2, 1, 3; int32 bias, float rescale of the four.
 *
 * The number of outputs is a multiple of four. PLANISH_CLAMP: the codes' bounds are not those of int8.
 */
#ifndef PLANISH_MVE_RESIDENT_H
#define PLANISH_MVE_RESIDENT_H

#include "planish.h"

enum { STEP = 16, WINDOWS = 4 / PLANISH_STEPS };

typedef struct {
    const int8_t *x;
} window_t;

/* the assembly code knows the places of the members */
typedef struct {
    window_t window[WINDOWS];
    int32_t size; /* 16, or 8 with two windows: codes of a window */
    int8_t *y[WINDOWS];
    int32_t zero_point; /* 36, 20 */
    const uint32_t *stream;
    const uint32_t *end; /* 44, 28 */
    int32_t low, high;   /* 48, 32 */
    int32_t outputs;     /* 56, 40 */
} windows_t;

static inline void start_windows(windows_t *job)
{
    (void)job;
}

#if defined(__ARM_FEATURE_MVE)

#if PLANISH_STEPS == 1

#ifdef PLANISH_CLAMP
#define BOUNDS                  \
    "ldrd r0, r2, [r12, #48]\n" \
    "vdup.8 q4, r0\n"           \
    "vmax.s8 q5, q5, q4\n"      \
    "vdup.8 q4, r2\n"           \
    "vmin.s8 q5, q5, q4\n"
#else
#define BOUNDS ""
#endif

/* one output of the four windows in q0 to q3 */
#define OUTPUT(q)                                \
    "vldrb.u8 q4, [r11], #16\n"                  \
    "vmladav.s8 r0, q0, q4\n"                    \
    "vmladav.s8 r2, q1, q4\n"                    \
    "vmladav.s8 r4, q2, q4\n"                    \
    "vmladav.s8 r6, q3, q4\n"                    \
    "vmov " q "[2], " q "[0], r0, r4\n"          \
    "vmov " q "[3], " q "[1], r2, r6\n"
/* codes of two outputs in the halfwords of a */
#define REQUANTIZE(a, b)                  \
    "ldm r11!, {r1, r3, r5, r8}\n"        \
    "vadd.i32 " a ", " a ", r1\n"         \
    "vadd.i32 " b ", " b ", r5\n"         \
    "vcvt.f32.s32 " a ", " a "\n"         \
    "vcvt.f32.s32 " b ", " b "\n"         \
    "vmul.f32 " a ", " a ", r3\n"         \
    "vmul.f32 " b ", " b ", r8\n"         \
    "vcvtn.s32.f32 " a ", " a "\n"        \
    "vcvtn.s32.f32 " b ", " b "\n"        \
    "vqmovnb.s32 " a ", " a "\n"          \
    "vqmovnt.s32 " a ", " b "\n"          \
    "vqadd.s16 " a ", " a ", r9\n"

#define MULTIPLY                            \
    "ldm r12, {r1, r3, r5, r8, r9}\n"       \
    "vctp.8 r9\n"                           \
    "ldr r0, [r12, #56]\n"                  \
    "vpstttt\n"                             \
    "vldrbt.u8 q0, [r1]\n"                  \
    "vldrbt.u8 q1, [r3]\n"                  \
    "vldrbt.u8 q2, [r5]\n"                  \
    "vldrbt.u8 q3, [r8]\n"                  \
    "lsrs r0, r0, #2\n"                     \
    "add r1, r12, #20\n"                    \
    "dls lr, r0\n"                          \
    "vldrw.u32 q7, [r1]\n"                  \
    "ldrd r9, r11, [r12, #36]\n"            \
    "movs r0, #4\n"                         \
    "vsub.i32 q7, q7, r0\n"                 \
    "1:\n"                                  \
    OUTPUT("q5")                            \
    OUTPUT("q6")                            \
    REQUANTIZE("q5", "q6")                  \
    OUTPUT("q6")                            \
    OUTPUT("q4")                            \
    REQUANTIZE("q6", "q4")                  \
    "vqmovnb.s16 q5, q5\n"                  \
    "vqmovnt.s16 q5, q6\n"                  \
    BOUNDS                                  \
    "vstrw.32 q5, [q7, #4]!\n"              \
    "le lr, 1b\n"

#else

#ifdef PLANISH_CLAMP
#define BOUNDS                  \
    "ldrd r0, r2, [r12, #32]\n" \
    "vdup.16 q7, r0\n"          \
    "vmax.s16 q5, q5, q7\n"     \
    "vdup.16 q7, r2\n"          \
    "vmin.s16 q5, q5, q7\n"
#else
#define BOUNDS ""
#endif

/* one output of the two windows in q0, q1 and q2, q3 */
#define OUTPUT(a, b)                       \
    "vldrb.u8 q4, [r11], #16\n"            \
    "vmladav.s8 " a ", q0, q4\n"           \
    "vmladav.s8 " b ", q2, q4\n"           \
    "vldrb.u8 q4, [r11], #16\n"            \
    "vmladava.s8 " a ", q1, q4\n"          \
    "vmladava.s8 " b ", q3, q4\n"

#define MULTIPLY                            \
    "ldm r12, {r1, r3, r5}\n"               \
    "subs r5, r5, #16\n"                    \
    "vldrb.u8 q0, [r1]\n"                   \
    "vctp.8 r5\n"                           \
    "vldrb.u8 q2, [r3]\n"                   \
    "ldr r0, [r12, #40]\n"                  \
    "vpstt\n"                               \
    "vldrbt.u8 q1, [r1, #16]\n"             \
    "vldrbt.u8 q3, [r3, #16]\n"             \
    "ldrd r1, r3, [r12, #12]\n"             \
    "lsrs r0, r0, #2\n"                     \
    "ldrd r9, r11, [r12, #20]\n"            \
    "dls lr, r0\n"                          \
    "1:\n"                                  \
    OUTPUT("r0", "r4")                      \
    OUTPUT("r2", "r6")                      \
    "vmov q5[2], q5[0], r0, r2\n"           \
    "vmov q6[2], q6[0], r4, r6\n"           \
    OUTPUT("r0", "r4")                      \
    OUTPUT("r2", "r6")                      \
    "vmov q5[3], q5[1], r0, r2\n"           \
    "vmov q6[3], q6[1], r4, r6\n"           \
    "vldrw.u32 q7, [r11], #16\n"            \
    "vadd.i32 q5, q5, q7\n"                 \
    "vadd.i32 q6, q6, q7\n"                 \
    "vldrw.u32 q7, [r11], #16\n"            \
    "vcvt.f32.s32 q5, q5\n"                 \
    "vcvt.f32.s32 q6, q6\n"                 \
    "vmul.f32 q5, q5, q7\n"                 \
    "vmul.f32 q6, q6, q7\n"                 \
    "vcvtn.s32.f32 q5, q5\n"                \
    "vcvtn.s32.f32 q6, q6\n"                \
    "vqmovnb.s32 q5, q5\n"                  \
    "vqmovnt.s32 q5, q6\n"                  \
    "vqadd.s16 q5, q5, r9\n"                \
    BOUNDS                                  \
    "vqmovnb.s16 q5, q5\n"                  \
    "vstrb.32 q5, [r1], #4\n"               \
    "vshr.u32 q5, q5, #16\n"                \
    "vstrb.32 q5, [r3], #4\n"               \
    "le lr, 1b\n"

#endif

static inline void multiply_windows(windows_t *job)
{
    register windows_t *at __asm__("r12") = job;
    __asm__ volatile(
        MULTIPLY
        : "+r"(at)
        :
        : "memory", "cc", "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r8", "r9", "r10", "r11", "lr", "q0", "q1", "q2",
          "q3", "q4", "q5", "q6", "q7");
}

#else

static inline void multiply_windows(windows_t *job)
{
    const uint32_t *stream = job->stream;
    int8_t window[WINDOWS][STEP * PLANISH_STEPS]; /* kept as in registers: outputs may lie over the input */
    int32_t o, i, k;
    for (i = 0; i < WINDOWS; i++) {
        for (k = 0; k < job->size; k++) {
            window[i][k] = job->window[i].x[k];
        }
    }
    for (; stream != job->end; stream += 4 * (STEP / 4 * PLANISH_STEPS + 2)) {
        for (o = 0; o < 4; o++) {
            int32_t place = o / 2 + o % 2 * 2; /* outputs 0, 2, 1, 3 */
#if PLANISH_STEPS == 1
            const uint32_t *pair = stream + place / 2 * 2 * (STEP / 4 + 2);
            const uint32_t *weight = pair + place % 2 * STEP / 4;
            const uint32_t *bias = pair + 2 * STEP / 4 + place % 2 * 2, *rescale = bias + 1;
#else
            const uint32_t *weight = stream + place * 2 * STEP / 4;
            const uint32_t *bias = stream + 4 * 2 * STEP / 4 + o, *rescale = bias + 4;
#endif
            union { uint32_t i; float f; } factor;
            factor.i = *rescale;
            for (i = 0; i < WINDOWS; i++) {
                int32_t sum = (int32_t)*bias;
                for (k = 0; k < job->size; k++) {
                    sum += window[i][k] * ((const int8_t *)weight)[k];
                }
                job->y[i][o] = planish_requantize(sum, factor.f, (float)(job->low - job->zero_point),
                                                  (float)(job->high - job->zero_point), job->zero_point);
            }
        }
        for (i = 0; i < WINDOWS; i++) {
            job->y[i] += 4;
        }
    }
}

#endif

#endif
