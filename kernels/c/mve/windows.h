/* Three windows (rows of bytes) times all outputs, with MVE: the inner part of a convolution.
 *
 * Weights, biases and factors lie in one stream in the order of their use. For every four outputs, K rounded up to steps of 16:
 *
 *     PLANISH_BITS 8: for every step 16 weights of output 0 and 16 of output 2; then those of outputs 1 and 3;
 *                     int32 bias, float rescale of the four
 *     PLANISH_BITS 4: for every step 16 bytes of outputs 0 and 2; then those of outputs 1 and 3; int32 bias, float rescale
 *     PLANISH_BITS 2: for every step 16 bytes of outputs 0, 2, 1 and 3; int32 bias, float rescale
 *
 * Bytes of several outputs are those of mve/narrow.h; bias and rescale are then those of the multiplied sums.
 * Two outputs meet three windows, so that five loads feed six times sixteen products; the pairs 0, 2 and 1, 3 are what one
 * instruction moves into a vector of four sums.
 *
 * PLANISH_PEEL (8 bits): the first step, or the first two, stand before the loop, so that sums need no start. Then K is more than 16;
 * with PLANISH_UNROLLED it is a multiple of 16 and the loop takes two steps at a time, at least once.
 * PLANISH_CLAMP: the codes' bounds are not those of int8. PLANISH_RAGGED: the number of outputs is no multiple of four.
 */
#ifndef PLANISH_MVE_WINDOWS_H
#define PLANISH_MVE_WINDOWS_H

#include "mve/narrow.h"
#include "planish.h"

enum { WINDOWS = 3, STEP = 16 };

/* a window, after what the sums with it start from where weights are narrow */
typedef struct {
    int32_t start;
    const int8_t *x;
} window_t;

/* the assembly code knows the places of the members */
typedef struct {
    window_t window[WINDOWS];
    int32_t loop; /* 24: codes, or twice two steps, that the loop takes */
    int8_t *y[WINDOWS];
    int32_t zero_point; /* 40 */
    const uint32_t *stream, *end;
    int32_t low, high;        /* 52 */
    int32_t outputs;          /* 60: that are left */
    window_t second[WINDOWS]; /* 64: for the second pair of outputs; 2 bits only */
    int32_t second_loop;
    const uint32_t *block; /* 92: of the stream, whose bytes both pairs read */
    int32_t size;          /* K, codes of a window */
} windows_t;

/* what a window's sums start from, by its own sum */
static inline void start_windows(windows_t *job)
{
#if PLANISH_BITS < 8
    int32_t i;
    for (i = 0; i < WINDOWS; i++) {
        int32_t sum = sum_of(job->window[i].x, job->size);
        job->window[i].start = -OFFSET * sum;
        job->second[i].start = -(OFFSET + 4 * OFFSET + 16 * OFFSET) * sum;
        job->second[i].x = job->window[i].x;
    }
    job->second_loop = job->size;
#endif
#ifdef PLANISH_UNROLLED
    job->loop = (job->size / STEP - PLANISH_PEEL) / 2;
#elif defined PLANISH_PEEL
    job->loop = job->size - STEP;
#else
    job->loop = job->size;
#endif
}

#if defined(__ARM_FEATURE_MVE)

/* sums of two outputs with three windows: r0, r2, r4 and r6, r8, r10; r1, r3, r5 windows, r9 K, r11 stream */
#if PLANISH_BITS == 8

#define MASKS ""
#define STEP_OF(multiply)         \
    "vldrb.u8 q3, [r11], #16\n"   \
    "vldrb.u8 q0, [r1], #16\n"    \
    multiply " r0, q0, q3\n"      \
    "vldrb.u8 q1, [r3], #16\n"    \
    multiply " r2, q1, q3\n"      \
    "vldrb.u8 q2, [r5], #16\n"    \
    multiply " r4, q2, q3\n"      \
    "vldrb.u8 q4, [r11], #16\n"   \
    multiply " r6, q0, q4\n"      \
    multiply " r8, q1, q4\n"      \
    multiply " r10, q2, q4\n"
#define FIRST_STEP STEP_OF("vmladav.s8")
#define NEXT_STEP STEP_OF("vmladava.s8")

#ifndef PLANISH_PEEL
#define BEFORE             \
    "movs r0, #0\n"        \
    "movs r2, #0\n"        \
    "movs r4, #0\n"        \
    "movs r6, #0\n"        \
    "mov r8, r0\n"         \
    "mov r10, r0\n"
#elif PLANISH_PEEL == 1
#define BEFORE FIRST_STEP
#else
#define BEFORE FIRST_STEP NEXT_STEP
#endif

#ifdef PLANISH_UNROLLED
#define LOOP            \
    "dls lr, r9\n"      \
    "1:\n"              \
    NEXT_STEP           \
    NEXT_STEP           \
    "le lr, 1b\n"
#else
#define LOOP            \
    "dlstp.8 lr, r9\n"  \
    "1:\n"              \
    NEXT_STEP           \
    "letp lr, 1b\n"
#endif

#define PAIR "ldm r12, {r0, r1, r2, r3, r4, r5, r9}\n" BEFORE LOOP
#define FIRST_PAIR PAIR TO_LANES("2", "0")
#define SECOND_PAIR PAIR TO_LANES("3", "1")

#else

/* a step whose byte is in q3 and whose lower part is in q4 */
#define STEP_OF_PAIR             \
    "vldrb.u8 q0, [r1], #16\n"   \
    "vmladava.s8 r0, q0, q4\n"   \
    "vmladava.s8 r6, q0, q3\n"   \
    "vldrb.u8 q0, [r3], #16\n"   \
    "vmladava.s8 r2, q0, q4\n"   \
    "vmladava.s8 r8, q0, q3\n"   \
    "vldrb.u8 q0, [r5], #16\n"   \
    "vmladava.s8 r4, q0, q4\n"   \
    "vmladava.s8 r10, q0, q3\n"
#define DIFFERENCES          \
    "subs r6, r6, r0\n"      \
    "sub r8, r8, r2\n"       \
    "sub r10, r10, r4\n"
#if PLANISH_BITS == 4

#define MASKS "vmov.i8 q2, #15\n"
#define PAIR                                  \
    "ldm r12, {r0, r1, r2, r3, r4, r5, r9}\n" \
    "dlstp.8 lr, r9\n"                        \
    "mov r6, r0\n"                            \
    "mov r8, r2\n"                            \
    "mov r10, r4\n"                           \
    "1:\n"                                    \
    "vldrb.u8 q3, [r11], #16\n"               \
    "vand q4, q3, q2\n"                       \
    STEP_OF_PAIR                              \
    "letp lr, 1b\n"                           \
    DIFFERENCES
#define FIRST_PAIR PAIR TO_LANES("2", "0")
#define SECOND_PAIR PAIR TO_LANES("3", "1")

#else

/* outputs 0 and 2 have the lowest 2 and 4 bits; the sums of 1 and 3 start as those of 2, negative, and use the lowest 6 and all */
#define MASKS "vmov.i8 q1, #3\n"
#define FIRST_PAIR                            \
    "ldm r12, {r0, r1, r2, r3, r4, r5, r9}\n" \
    "vmov.i8 q2, #15\n"                       \
    "str r11, [r12, #92]\n"                   \
    "add r6, r0, r0, lsl #2\n"                \
    "add r8, r2, r2, lsl #2\n"                \
    "add r10, r4, r4, lsl #2\n"               \
    "dlstp.8 lr, r9\n"                        \
    "1:\n"                                    \
    "vldrb.u8 q3, [r11], #16\n"               \
    "vand q4, q3, q1\n"                       \
    "vand q3, q3, q2\n"                       \
    STEP_OF_PAIR                              \
    "letp lr, 1b\n"                           \
    DIFFERENCES                               \
    TO_LANES("2", "0")
#define SECOND_PAIR                           \
    "add r6, r6, r0\n"                        \
    "add r8, r8, r2\n"                        \
    "add r10, r10, r4\n"                      \
    "add r14, r12, #64\n"                     \
    "ldm r14, {r0, r1, r2, r3, r4, r5, r9}\n" \
    "vmov.i8 q2, #63\n"                       \
    "subs r0, r0, r6\n"                       \
    "subs r2, r2, r8\n"                       \
    "sub r4, r4, r10\n"                       \
    "ldr r11, [r12, #92]\n"                   \
    "mov r6, r0\n"                            \
    "mov r8, r2\n"                            \
    "mov r10, r4\n"                           \
    "dlstp.8 lr, r9\n"                        \
    "1:\n"                                    \
    "vldrb.u8 q3, [r11], #16\n"               \
    "vand q4, q3, q2\n"                       \
    STEP_OF_PAIR                              \
    "letp lr, 1b\n"                           \
    DIFFERENCES                               \
    TO_LANES("3", "1")

#endif
#endif

#define BIAS                      \
    "vldrw.u32 q0, [r11], #16\n"  \
    "vadd.i32 q5, q5, q0\n"       \
    "vadd.i32 q6, q6, q0\n"       \
    "vadd.i32 q7, q7, q0\n"

#define TO_LANES(high, low)                              \
    "vmov q5[" high "], q5[" low "], r0, r6\n"           \
    "vmov q6[" high "], q6[" low "], r2, r8\n"           \
    "vmov q7[" high "], q7[" low "], r4, r10\n"

#ifdef PLANISH_CLAMP
#define BOUNDS                  \
    "ldrd r0, r2, [r12, #52]\n" \
    "vdup.32 q3, r0\n"          \
    "vdup.32 q4, r2\n"
#define SATURATE(q)               \
    "vmax.s32 " q ", " q ", q3\n" \
    "vmin.s32 " q ", " q ", q4\n"
#else
#define BOUNDS ""
#define SATURATE(q)              \
    "vqmovnb.s32 " q ", " q "\n" \
    "vqmovnb.s16 " q ", " q "\n"
#endif

#ifdef PLANISH_RAGGED
#define STORES                 \
    "ldr r0, [r12, #60]\n"     \
    "vctp.32 r0\n"             \
    "subs r0, r0, #4\n"        \
    "str r0, [r12, #60]\n"     \
    "vpsttt\n"                 \
    "vstrbt.32 q5, [r1], #4\n" \
    "vstrbt.32 q6, [r3], #4\n" \
    "vstrbt.32 q7, [r5], #4\n"
#else
#define STORES                \
    "vstrb.32 q5, [r1], #4\n" \
    "vstrb.32 q6, [r3], #4\n" \
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
        "ldr r11, [r12, #44]\n"
        MASKS
        "5:\n"
        FIRST_PAIR
        SECOND_PAIR
        BIAS
        "vldrw.u32 q0, [r11], #16\n"
        EACH(TO_FLOAT)
        "ldrd r1, r3, [r12, #28]\n"
        EACH(SCALE)
        "ldrd r5, r9, [r12, #36]\n"
        EACH(ROUND)
        EACH(MOVE_ZERO)
        BOUNDS
        EACH(SATURATE)
        STORES
        "ldr r0, [r12, #48]\n"
        "strd r1, r3, [r12, #28]\n"
        "str r5, [r12, #36]\n"
        "cmp r11, r0\n"
        "bne 5b\n"
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
        const uint32_t *bias = stream + STEP / 4 * steps * 4 / LEVELS;
        const float *rescale = (const float *)(bias + 4);
        for (o = 0; o < 4 && o < job->outputs; o++) {
            int32_t level = PLANISH_BITS == 8 ? 0 : PLANISH_BITS == 4 ? o / 2 : o / 2 + o % 2 * 2;
            for (i = 0; i < WINDOWS; i++) {
                int32_t sum = (int32_t)bias[o];
                for (k = 0; k < job->size; k++) {
#if PLANISH_BITS == 8
                    int32_t byte = ((const int8_t *)stream)[((o % 2 * steps + k / STEP) * 2 + o / 2) * STEP + k % STEP];
#elif PLANISH_BITS == 4
                    int32_t byte = ((const int8_t *)stream)[o % 2 * steps * STEP + k];
#else
                    int32_t byte = ((const int8_t *)stream)[k];
#endif
                    sum += job->window[i].x[k] * weight_in_place(byte, level);
                }
                job->y[i][o] = planish_requantize(sum, rescale[o], (float)(job->low - job->zero_point),
                                                  (float)(job->high - job->zero_point), job->zero_point);
            }
        }
        for (i = 0; i < WINDOWS; i++) {
            job->y[i] += 4;
        }
        job->outputs -= 4;
        stream = (const uint32_t *)(rescale + 4);
    }
}

#endif

#endif
