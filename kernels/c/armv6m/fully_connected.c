/* Fully connected layer on one row: two outputs in one multiplication.
 *
 * A word of weights holds those of two outputs for the same inputs, plus Z = 2^(WEIGHT_BITS - 1), the first output's in its
 * lower half. Masked, it is first + second * 2^16 for one input, and one product with the input's code serves both outputs.
 * A chunk of TAPS products is summed before the sums are taken apart; the weights are such that no sum leaves 16 bits. The
 * codes of at most MOST_INPUTS inputs lie on the stack, one in a word, and every chunk starts with what takes Z back from both halves:
 *
 *     start = 2^15 - Z * (sum of the chunk's codes) * (2^16 + 1)      sum = start + (masked word) * code + ...
 *     second += sum >> 16      both += sum                            first = both - second * 2^16 - chunks * 2^15
 *
 * 8 bits: the first of two inputs meets the whole word, even + odd * 2^8, and the second code, less 2^8 times the first, the
 * masked rest. Chunks with heavier weights are stored with a part of them; the rest comes as `extra` chunks.
 * Constants: WEIGHT_BITS, TAPS of a chunk (8 bits: 2, 4, 8; 4 bits: 16; 2 bits: 32), EXTRA, SKIPS (chunks are no multiple of
 * UNROLL), PARTS (there are several blocks of inputs), and those of code.h.
 */
#include "armv6m/fully_connected.h"

#define CHUNK_WORDS (TAPS + 1)
#define WORDS (TAPS * WEIGHT_BITS / 16) /* of weights in a chunk */
#if WEIGHT_BITS == 8
#define UNROLL (16 / TAPS)
#define CHUNK_CODE (16 * WORDS + 6)
#define MASK 0x00FF00FFu
#elif WEIGHT_BITS == 4
#define UNROLL 1
#define CHUNK_CODE (38 * WORDS + 8)
#define MASK 0x000F000Fu
#else
#define UNROLL 1
#define CHUNK_CODE (74 * WORDS + 8)
#define MASK 0x00030003u
#endif

enum { MOST_INPUTS = 128, MOST_PAIRS = 32 }; /* of a block, where there are several */

void PLANISH_KERNEL(const planish_armv6m_fully_connected_layer *l, const int8_t *x, int8_t *y);

/* the assembler knows this order */
typedef struct block {
    const int32_t *words;
    int8_t *y;
    uint32_t half, before;
    int32_t start; /* - chunks * 2^15 */
    uint32_t mask;
    const uint32_t *extra; /* the end of those used, afterwards */
    uint32_t limit;
    const planish_scale *scale;
    const int32_t *channel_end;
    int32_t entry; /* bytes of code before the first chunk */
    uint32_t window;
    int32_t low, high;
    uint32_t *sums; /* second and both of every pair */
    int32_t last;   /* whether this is the last block of inputs */
    struct block *self;
    const int32_t *channel;
    const int32_t *words_end;
    const uint32_t *weight; /* the end of those used, afterwards */
} block_t;

#if defined(__ARM_ARCH_6M__)
#define LOW 48
#define HIGH 52
#include "armv6m/code.h"

/* r0 words, r1 weights, r3 sum, r7 mask; r2, r4 to r6 free; r8 second, r9 both */
#define SPLIT "add r9, r3\n asrs r3, r3, #16\n add r8, r3\n"
#if WEIGHT_BITS == 8
#define INPUTS                                                                                                         \
    "ldmia r1!, {r2}\n lsrs r6, r2, #8\n ands r6, r7\n muls r2, r4\n adds r3, r2\n muls r6, r5\n adds r3, r6\n"
#define MORE "ldmia r0!, {r4, r5}\n" INPUTS
#define FIRST "ldmia r0!, {r3, r4, r5}\n" INPUTS
#if TAPS == 2
#define CHUNK FIRST SPLIT
#elif TAPS == 4
#define CHUNK FIRST MORE SPLIT
#else
#define CHUNK FIRST MORE MORE MORE SPLIT
#endif
#else
#define TAP(x, shift) "lsrs r6, r2, #" #shift "\n ands r6, r7\n muls r6, " x "\n adds r3, r6\n"
#define TWO(a, b) "ldmia r0!, {r4, r5}\n" TAP("r4", a) TAP("r5", b)
#define LOWEST(b) "ldmia r0!, {r4, r5}\n mov r6, r2\n ands r6, r7\n muls r6, r4\n adds r3, r6\n" TAP("r5", b)
#if WEIGHT_BITS == 4
#define WORD "ldmia r1!, {r2}\n" LOWEST(4) TWO(8, 12)
#else
#define WORD "ldmia r1!, {r2}\n" LOWEST(2) TWO(4, 6) TWO(8, 10) TWO(12, 14)
#endif
#define CHUNK "ldmia r0!, {r3}\n" WORD WORD WORD WORD SPLIT
#endif
#if UNROLL == 8
#define CHUNKS CHUNK CHUNK CHUNK CHUNK CHUNK CHUNK CHUNK CHUNK
#elif UNROLL == 4
#define CHUNKS CHUNK CHUNK CHUNK CHUNK
#elif UNROLL == 2
#define CHUNKS CHUNK CHUNK
#else
#define CHUNKS CHUNK
#endif
#if BEFORE
#define SHIFT(x) "ldr r5, [sp, #12]\n lsls " x ", r5\n"
#else
#define SHIFT(x)
#endif
#define AGAIN "ldr r7, [sp, #40]\n mov lr, r7\n ldr r7, [sp, #44]\n mov r12, r7\n"

__attribute__((naked, noinline)) static void outputs_of(block_t *p __attribute__((unused)))
{
    __asm__(".syntax unified\n"
            "push {r4, r5, r6, r7, lr}\n"
            "mov r4, r8\n mov r5, r9\n mov r6, r10\n mov r7, r11\n"
            "push {r4, r5, r6, r7}\n"
            "sub sp, #68\n"
            "mov r1, sp\n"
            "ldmia r0!, {r2, r3, r4, r5, r6, r7}\n stmia r1!, {r2, r3, r4, r5, r6, r7}\n"
            "ldmia r0!, {r2, r3, r4, r5, r6, r7}\n stmia r1!, {r2, r3, r4, r5, r6, r7}\n"
            "mov lr, r6\n mov r12, r7\n" /* entry, window */
            "ldmia r0!, {r2, r3, r4, r5, r6}\n stmia r1!, {r2, r3, r4, r5, r6}\n"
            "ldmia r0!, {r2, r3, r4}\n"
            "mov r11, r2\n mov r10, r3\n mov r1, r4\n" /* channel, words_end, weight */

            "1: ldr r0, [sp, #0]\n ldr r7, [sp, #20]\n"
#if PARTS
            "ldr r6, [sp, #56]\n ldmia r6!, {r2, r3}\n str r6, [sp, #56]\n mov r8, r2\n mov r9, r3\n"
#else
            "ldr r2, [sp, #16]\n mov r9, r2\n movs r2, #0\n mov r8, r2\n"
#endif
#if SKIPS
            "add pc, lr\n nop\n"
#endif
            "2:\n" CHUNKS "cmp r0, r10\n beq 3f\n b 2b\n"
            "3:\n"
#if EXTRA
            "ldr r6, [sp, #24]\n ldmia r6!, {r2}\n str r6, [sp, #24]\n adds r3, r2, #1\n bne 10f\n"
            "4:\n"
#endif
#if PARTS
            "ldr r2, [sp, #60]\n cmp r2, #0\n beq 12f\n"
#endif
            "mov r0, r8\n mov r2, r9\n lsls r3, r0, #16\n subs r2, r2, r3\n" /* r0 second, r2 first */
            "mov r7, r11\n ldmia r7!, {r3, r4}\n mov r11, r7\n adds r2, r3\n" SHIFT("r2")
            "lsrs r6, r4, #16\n ldr r5, [sp, #8]\n ldr r3, [sp, #28]\n" CODE("r2", "0") /* mantissa, half, limit */
            "mov r7, r11\n ldmia r7!, {r3, r4}\n mov r11, r7\n adds r0, r3\n" SHIFT("r0")
            "lsrs r6, r4, #16\n ldr r5, [sp, #8]\n ldr r3, [sp, #28]\n" CODE("r0", "1")
            "ldr r7, [sp, #4]\n strb r2, [r7]\n strb r0, [r7, #1]\n adds r7, #2\n str r7, [sp, #4]\n"
            "13: ldr r3, [sp, #36]\n cmp r3, r11\n beq 5f\n b 1b\n"

            "5: ldr r0, [sp, #64]\n ldr r2, [sp, #24]\n str r2, [r0, #24]\n str r1, [r0, #76]\n"
            "add sp, #68\n"
            "pop {r4, r5, r6, r7}\n mov r8, r4\n mov r9, r5\n mov r10, r6\n mov r11, r7\n"
            "pop {r4, r5, r6, r7, pc}\n"
#if EXTRA
            "10: mov r12, r1\n mov r1, r6\n"
            "11: ldr r0, [sp, #0]\n adds r0, r2\n" CHUNK
            "movs r2, #1\n lsls r2, r2, #15\n mov r3, r9\n subs r3, r3, r2\n mov r9, r3\n"
            "ldmia r1!, {r2}\n adds r3, r2, #1\n bne 11b\n"
            "str r1, [sp, #24]\n mov r1, r12\n ldr r7, [sp, #44]\n mov r12, r7\n b 4b\n"
#endif
#if PARTS
            "12: ldr r6, [sp, #56]\n subs r6, #8\n mov r2, r8\n mov r3, r9\n stmia r6!, {r2, r3}\n"
            "mov r7, r11\n adds r7, #16\n mov r11, r7\n b 13b\n"
#endif
            SATURATED("r2", "0") SATURATED("r0", "1")
            "220: push {r0, r1, r3, r4}\n" /* first = both - second * 2^16 + bias */
            "mov r0, r9\n mov r1, r8\n lsls r1, r1, #16\n subs r0, r0, r1\n"
            "bl 6f\n mov r2, r0\n pop {r0, r1, r3, r4}\n" AGAIN "b 230b\n"
            "221: push {r1, r2, r3, r4}\n mov r0, r8\n"
            "bl 6f\n pop {r1, r2, r3, r4}\n" AGAIN "b 231b\n"
            "6: push {r4, lr}\n mov r1, r11\n subs r1, #8\n ldr r1, [r1]\n adds r0, r0, r1\n"
            "mov r1, r4\n ldr r2, [sp, #56]\n bl planish_exact_code\n pop {r4, pc}\n");
}
#else
static const uint32_t *add_chunk(const int32_t *words, const uint32_t *weight, uint32_t *second, uint32_t *both)
{
    uint32_t sum = (uint32_t)*words++;
    int32_t i, shift;
    for (i = 0; i < WORDS; i++) {
#if WEIGHT_BITS == 8
        sum += weight[i] * (uint32_t)words[0] + (weight[i] >> 8 & MASK) * (uint32_t)words[1];
        words += 2;
        shift = 0;
#else
        for (shift = 0; shift < 16; shift += WEIGHT_BITS) {
            sum += (weight[i] >> shift & MASK) * (uint32_t)*words++;
        }
#endif
    }
    (void)shift;
    *both += sum;
    *second += (uint32_t)((int32_t)sum >> 16);
    return weight + WORDS;
}

static void outputs_of(block_t *p)
{
    const int32_t *words, *channel;
    const uint32_t *weight = p->weight, *extra = p->extra;
    uint32_t *sums = p->sums;
    int8_t *y = p->y;
    for (channel = p->channel; channel != p->channel_end; channel += 4) {
        uint32_t second = sums ? sums[0] : 0, both = sums ? sums[1] : (uint32_t)p->start;
        for (words = p->words; words != p->words_end; words += CHUNK_WORDS) {
            weight = add_chunk(words, weight, &second, &both);
        }
#if EXTRA
        for (; *extra != 0xFFFFFFFFu; both -= 32768u) {
            words = p->words + *extra / 4;
            extra = add_chunk(words, extra + 1, &second, &both);
        }
        extra++;
#endif
        if (sums) {
            sums[0] = second;
            sums[1] = both;
            sums += 2;
        }
        if (p->last) {
            *y++ = (int8_t)planish_code((int32_t)(both - (second << 16)) + channel[0], (uint32_t)channel[1], p->scale);
            *y++ = (int8_t)planish_code((int32_t)second + channel[2], (uint32_t)channel[3], p->scale);
        }
    }
    p->weight = weight;
    p->extra = extra;
}
#endif

/* `chunks` chunks of words from `left` codes, then zeros */
static int32_t *expand(const int8_t *x, int32_t left, int32_t *to, int32_t chunks)
{
    int32_t k;
    PLANISH_SMALL_LOOP
    for (; chunks > 0; chunks--) {
        uint32_t sum = 0, before = 0;
        for (k = 1; k <= TAPS; k++) {
            uint32_t code = left > 0 ? (uint32_t)(int32_t)*x++ : 0;
            left--;
            sum += code;
#if WEIGHT_BITS == 8
            to[k] = (int32_t)(k & 1 ? code : code - (before << 8));
#else
            to[k] = (int32_t)code;
#endif
            before = code;
        }
        (void)before;
        to[0] = (int32_t)(32768u - (sum << (WEIGHT_BITS - 1)) * 65537u);
        to += CHUNK_WORDS;
    }
    return to;
}

/* outputs of `pairs` pairs from the next weights on */
static void block(const planish_armv6m_fully_connected_layer *l, const int8_t *x, int32_t pairs, block_t *p)
{
    int32_t words[MOST_INPUTS / TAPS * CHUNK_WORDS];
    int32_t left = l->in_features;
#if PARTS
    uint32_t sums[2 * MOST_PAIRS];
    int32_t i;
    PLANISH_SMALL_LOOP
    for (i = 0; i < pairs; i++) {
        sums[2 * i] = 0;
        sums[2 * i + 1] = (uint32_t)p->start;
    }
#else
    uint32_t *sums = 0;
#endif
    p->channel_end = p->channel + 4 * pairs;
    p->words = words;
    for (; left > 0; left -= l->block_chunks * TAPS, x += l->block_chunks * TAPS) {
        int32_t chunks = 0, inputs = 0;
        PLANISH_SMALL_LOOP
        while (inputs < left && chunks < l->block_chunks) {
            inputs += TAPS;
            chunks++;
        }
        p->words_end = expand(x, left, words, chunks);
        p->entry = ((0 - chunks) & (UNROLL - 1)) * CHUNK_CODE;
        p->sums = sums;
        p->last = left <= l->block_chunks * TAPS;
        outputs_of(p);
    }
    p->channel = p->channel_end;
}

void PLANISH_KERNEL(const planish_armv6m_fully_connected_layer *l, const int8_t *x, int8_t *y)
{
    int32_t chunks = 0, done;
    int8_t codes[2];
    block_t p;
    PLANISH_SMALL_LOOP
    for (done = 0; done < l->in_features; done += TAPS) {
        chunks++;
    }
    p.half = l->scale.half;
    p.before = l->scale.before;
    p.start = -(chunks << 15);
    p.mask = MASK;
    p.extra = l->extra;
    p.limit = l->scale.limit;
    p.scale = &l->scale;
    p.window = l->scale.window;
    p.low = l->scale.low;
    p.high = l->scale.high;
    p.self = &p;
    p.channel = l->channel;
    p.weight = l->weight;
    for (done = 0; done + 1 < l->out_features;) {
        int32_t pairs = (l->out_features - done) >> 1;
        pairs = pairs < l->block_pairs ? pairs : l->block_pairs;
        p.y = y + done;
        block(l, x, pairs, &p);
        done += 2 * pairs;
    }
    if (done < l->out_features) { /* half a pair more */
        p.y = codes;
        block(l, x, 1, &p);
        y[done] = codes[0];
    }
}
