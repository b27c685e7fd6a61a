/* Fully connected layer with MVE: four outputs at a time.
 *
 * Weights, biases and factors lie in one stream in the order of their use. For every four outputs, inputs in steps of 16:
 *
 *     PLANISH_BITS 8: int32 bias of the four; for every step 16 weights of each; float rescale of the four
 *     PLANISH_BITS 4: for every step 16 bytes of outputs 0 and 1, and of 2 and 3; int32 bias, float rescale
 *     PLANISH_BITS 2: for every step 16 bytes of the four; int32 bias, float rescale
 *
 * Bytes of several outputs are those of mve/narrow.h; bias and rescale are then those of the multiplied sums.
 * PLANISH_UNROLLED: the number of inputs is a multiple of 32, and the loop takes two steps at a time.
 * PLANISH_CLAMP: the codes' bounds are not those of int8. PLANISH_RAGGED: the number of outputs is no multiple of four.
 */
#include "mve/fully_connected.h"
#include "mve/narrow.h"

enum { STEP = 16, BLOCK = 4 };

/* the assembly code knows the places of the members */
typedef struct {
    int32_t start[BLOCK]; /* of the sums; narrow weights only */
    const int8_t *x;      /* 16 */
    int8_t *y;
    const uint32_t *end;  /* 24 */
    int32_t zero_point;
    int32_t loop;         /* 32: codes, or twice 16 codes, that the loop takes */
    const uint32_t *stream;
    int32_t low, high;    /* 40 */
    int32_t outputs;      /* 48: that are left */
    int32_t size;         /* codes of the input */
} job_t;

#if defined(__ARM_FEATURE_MVE)

#if PLANISH_BITS == 8
#define START "ldm r11!, {r0, r2, r4, r6}\n"
#define MASKS ""
#define PRODUCTS                 \
    "vldrb.u8 q1, [r11], #16\n"  \
    "vldrb.u8 q0, [r1], #16\n"   \
    "vmladava.s8 r0, q0, q1\n"   \
    "vldrb.u8 q2, [r11], #16\n"  \
    "vmladava.s8 r2, q0, q2\n"   \
    "vldrb.u8 q3, [r11], #16\n"  \
    "vmladava.s8 r4, q0, q3\n"   \
    "vldrb.u8 q4, [r11], #16\n"  \
    "vmladava.s8 r6, q0, q4\n"
#define DIFFERENCES ""
#define BIAS ""
#elif PLANISH_BITS == 4
#define START "ldm r12, {r0, r2, r4, r6}\n"
#define MASKS "vmov.i8 q7, #15\n"
#define PRODUCTS                 \
    "vldrb.u8 q1, [r11], #16\n"  \
    "vand q2, q1, q7\n"          \
    "vldrb.u8 q0, [r1], #16\n"   \
    "vmladava.s8 r2, q0, q1\n"   \
    "vldrb.u8 q3, [r11], #16\n"  \
    "vmladava.s8 r0, q0, q2\n"   \
    "vand q4, q3, q7\n"          \
    "vmladava.s8 r6, q0, q3\n"   \
    "vmladava.s8 r4, q0, q4\n"
#define DIFFERENCES      \
    "subs r2, r2, r0\n"  \
    "subs r6, r6, r4\n"
#else
#define START "ldm r12, {r0, r2, r4, r6}\n"
#define MASKS               \
    "vmov.i8 q5, #63\n"     \
    "vmov.i8 q6, #3\n"      \
    "vmov.i8 q7, #15\n"
#define PRODUCTS                 \
    "vldrb.u8 q1, [r11], #16\n"  \
    "vand q2, q1, q6\n"          \
    "vldrb.u8 q0, [r1], #16\n"   \
    "vmladava.s8 r6, q0, q1\n"   \
    "vand q3, q1, q7\n"          \
    "vmladava.s8 r0, q0, q2\n"   \
    "vand q4, q1, q5\n"          \
    "vmladava.s8 r2, q0, q3\n"   \
    "vmladava.s8 r4, q0, q4\n"
#define DIFFERENCES      \
    "subs r6, r6, r4\n"  \
    "subs r4, r4, r2\n"  \
    "subs r2, r2, r0\n"
#endif

#if PLANISH_BITS < 8
#define BIAS                     \
    "vldrw.u32 q2, [r11], #16\n" \
    "vadd.i32 q0, q0, q2\n"
#endif

#ifdef PLANISH_UNROLLED
#define LOOP            \
    "dls lr, r10\n"     \
    "1:\n"              \
    PRODUCTS            \
    PRODUCTS            \
    "le lr, 1b\n"
#else
#define LOOP            \
    "dlstp.8 lr, r10\n" \
    "1:\n"              \
    PRODUCTS            \
    "letp lr, 1b\n"
#endif

#ifdef PLANISH_CLAMP
#define SATURATE               \
    "ldr r1, [r12, #40]\n"     \
    "vdup.32 q1, r1\n"         \
    "ldr r1, [r12, #44]\n"     \
    "vmax.s32 q0, q0, q1\n"    \
    "vdup.32 q1, r1\n"         \
    "vmin.s32 q0, q0, q1\n"
#else
#define SATURATE             \
    "vqmovnb.s32 q0, q0\n"   \
    "vqmovnb.s16 q0, q0\n"
#endif

#ifdef PLANISH_RAGGED
#define STORE                   \
    "ldr r1, [r12, #48]\n"      \
    "vctp.32 r1\n"              \
    "subs r1, r1, #4\n"         \
    "str r1, [r12, #48]\n"      \
    "vpst\n"                    \
    "vstrbt.32 q0, [r5], #4\n"
#else
#define STORE "vstrb.32 q0, [r5], #4\n"
#endif

static inline void multiply(job_t *job)
{
    register job_t *at __asm__("r12") = job;
    __asm__ volatile(
        "ldrd r3, r5, [r12, #16]\n"
        "ldrd r8, r9, [r12, #24]\n"
        "ldrd r10, r11, [r12, #32]\n"
        MASKS
        "5:\n"
        START
        "mov r1, r3\n"
        LOOP
        DIFFERENCES
        "vmov q0[2], q0[0], r0, r4\n"
        "vmov q0[3], q0[1], r2, r6\n"
        BIAS
        "vldrw.u32 q1, [r11], #16\n"
        "vcvt.f32.s32 q0, q0\n"
        "vmul.f32 q0, q0, q1\n"
        "vcvtn.s32.f32 q0, q0\n"
        "vqadd.s32 q0, q0, r9\n"
        SATURATE
        STORE
        "cmp r11, r8\n"
        "bne 5b\n"
        : "+r"(at)
        :
        : "memory", "cc", "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r8", "r9", "r10", "r11", "lr", "q0", "q1", "q2",
          "q3", "q4", "q5", "q6", "q7");
}

#else

static inline void multiply(job_t *job)
{
    const uint32_t *stream = job->stream;
    int32_t steps = (job->size + STEP - 1) / STEP, count = BLOCK / LEVELS, o, k;
    while (stream != job->end) {
        const uint32_t *bias = PLANISH_BITS == 8 ? stream : stream + STEP / 4 * steps * count;
        const int8_t *weight = (const int8_t *)(PLANISH_BITS == 8 ? stream + BLOCK : stream);
        const float *rescale = (const float *)(stream + STEP / 4 * steps * count + BLOCK);
        for (o = 0; o < BLOCK && o < job->outputs; o++) {
            int32_t sum = (int32_t)bias[o];
            for (k = 0; k < job->size; k++) {
                int32_t byte = weight[(k / STEP * count + o / LEVELS) * STEP + k % STEP];
                sum += job->x[k] * weight_in_place(byte, o % LEVELS);
            }
            *job->y++ = planish_requantize(sum, rescale[o], (float)(job->low - job->zero_point),
                                           (float)(job->high - job->zero_point), job->zero_point);
        }
        job->outputs -= BLOCK;
        stream = (const uint32_t *)(rescale + BLOCK);
    }
}

#endif

void PLANISH_KERNEL(const planish_mve_fully_connected_layer *l, const int8_t *x, int8_t *y)
{
    job_t job;
#if PLANISH_BITS < 8
    int32_t sum = sum_of(x, l->in_features);
    job.start[0] = -OFFSET * sum;
    job.start[1] = PLANISH_BITS == 2 ? -(OFFSET + 4 * OFFSET) * sum : -OFFSET * sum;
    job.start[2] = PLANISH_BITS == 2 ? -(OFFSET + 4 * OFFSET + 16 * OFFSET) * sum : -OFFSET * sum;
    job.start[3] = job.start[2];
#endif
    job.x = x;
    job.y = y;
    job.stream = l->weight;
    job.end = l->weight + l->words;
    job.zero_point = l->y_zero_point;
    job.size = l->in_features;
#ifdef PLANISH_UNROLLED
    job.loop = l->in_features / (2 * STEP);
#else
    job.loop = l->in_features;
#endif
    job.low = l->low;
    job.high = l->high;
    job.outputs = l->out_features;
    multiply(&job);
}
