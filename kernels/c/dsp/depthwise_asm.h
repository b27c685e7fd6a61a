/* A row of outputs of dsp/depthwise_conv2d.c for 3 x 3 kernels: 24 instructions for two outputs of stride 1, with their codes. */
#ifndef PLANISH_DSP_DEPTHWISE_ASM_H
#define PLANISH_DSP_DEPTHWISE_ASM_H

#include "dsp/depthwise_channel.h"

/* r0 to r5: weights (w0, w1), (w1, w2) of each row; r6, r7: codes; r8, r9: sums; r10: slot 0 at the window; r11: output;
 * r12: step; lr: factor */
#define AT(slot, byte) "[r10, #" TEXT(slot * ROW_BYTES + byte) "]\n"
#if COLUMN_STRIDE == 1
#define TOP_SECOND(byte) "smultb r9, r6, r0\n" "smlad r9, r7, r1, r9\n"
#define NEXT_SECOND(slot, byte, first, second) \
    "smlatb r9, r6, " first ", r9\n" \
    "smlad r9, r7, " second ", r9\n"
#else
#define TOP_SECOND(byte) "ldr r6, " AT(0, byte + 8) "smuad r9, r7, r0\n" "smlabt r9, r6, r1, r9\n"
#define NEXT_SECOND(slot, byte, first, second) \
    "ldr r6, " AT(slot, byte + 8) \
    "smlad r9, r7, " first ", r9\n" \
    "smlabt r9, r6, " second ", r9\n"
#endif
#define TOP_ROW(byte) \
    "ldrd r6, r7, " AT(0, byte) \
    "smuad r8, r6, r0\n" \
    "smlabt r8, r7, r1, r8\n"
#define NEXT_ROW(slot, byte, first, second) \
    "ldrd r6, r7, " AT(slot, byte) \
    "smlad r8, r6, " first ", r8\n" \
    "smlabt r8, r7, " second ", r8\n"
#define TWO_SUMS(byte) \
    TOP_ROW(byte) TOP_SECOND(byte) \
    NEXT_ROW(1, byte, "r2", "r3") NEXT_SECOND(1, byte, "r2", "r3") \
    NEXT_ROW(2, byte, "r4", "r5") NEXT_SECOND(2, byte, "r4", "r5")
#define ONE_SUM TOP_ROW(0) NEXT_ROW(1, 0, "r2", "r3") NEXT_ROW(2, 0, "r4", "r5")
#if SATURATE == 0
#define SATURATED(code) "ssat " code ", #" TEXT(Y_BITS) ", " code "\n"
#else
#define SATURATED(code) "usat " code ", #" TEXT(Y_BITS) " - 1, " code "\n"
#endif
/* s0, s1: start */
#define CODE(sum, place) \
    "vmov r6, r7, s0, s1\n" \
    "smlal r6, r7, " sum ", lr\n" \
    SATURATED("r7") \
    "strb r7, " place "\n"
/* s0: bias, s5: factor, lr: zero point */
#define FLOAT_CODE(sum, place) \
    "vmov r6, s0\n" \
    "add r6, r6, " sum "\n" \
    "vmov s6, r6\n" \
    "vcvt.f32.s32 s6, s6\n" \
    "vmul.f32 s6, s6, s5\n" \
    "vcvtr.s32.f32 s6, s6\n" \
    "vmov r7, s6\n" \
    "add r7, r7, lr\n" \
    SATURATED("r7") \
    "strb r7, " place "\n"
#define TWO_OUTPUTS(byte) TWO_SUMS(byte) CODE("r8", "[r11]") CODE("r9", "[r11, r12]") "add r11, r11, r12, lsl #1\n"

/* One row of outputs of `count` channels; `turn`: bytes from a channel's weights to those that slot 0 meets. s2: end, s3: rest,
 * s4: zero point, s8: channel, s9: its output, s10: turn, s11: end of the channels. r7 may be a frame pointer, which no clobber
 * may name: it is saved here. */
static PLANISH_APART void convolve(const planish_dsp_depthwise_conv2d_layer *l, const int8_t *rows,
                                   const channel_t *channel, int32_t count, int32_t turn, int8_t *y)
{
    register const channel_t *first __asm__("r0") = channel;
    register const channel_t *last __asm__("r1") = channel + count;
    register int32_t weights __asm__("r9") = turn;
    register int8_t *out __asm__("r11") = y;
    (void)l;
    (void)rows;
    __asm__ volatile(
        "push {r7}\n"
        "vmov s10, s11, r9, r1\n"
        "1:\n" /* a channel */
        "vmov s8, s9, r0, r11\n"
        "vldm r0!, {s0-s4}\n"
        "ldm r0!, {r10, r12, lr}\n"
        "vmov r9, s10\n"
        "add r9, r9, r0\n"
        "ldm r9, {r0-r5}\n"
        "cmp lr, #0\n"
        "bge 5f\n"
        "bic lr, lr, #0x80000000\n"
        "vmov s5, lr\n"
        "vmov lr, s4\n"
        "vmov r6, r7, s2, s3\n"
        "tst r7, #2\n"
        "it ne\n"
        "addne r6, r6, #" TEXT(4 * COLUMN_STRIDE) "\n"
        "vmov s2, r6\n"
        "b 3f\n"
        "2:\n" TWO_SUMS(0) FLOAT_CODE("r8", "[r11]") FLOAT_CODE("r9", "[r11, r12]")
        "add r11, r11, r12, lsl #1\n"
        "add r10, r10, #" TEXT(4 * COLUMN_STRIDE) "\n"
        "3:\n"
        "vmov r6, r7, s2, s3\n"
        "cmp r10, r6\n"
        "bne 2b\n"
        "tst r7, #1\n"
        "beq 7f\n" ONE_SUM FLOAT_CODE("r8", "[r11]")
        "b 7f\n"
        "4:\n" TWO_OUTPUTS(0) TWO_OUTPUTS(4 * COLUMN_STRIDE)
        "add r10, r10, #" TEXT(8 * COLUMN_STRIDE) "\n"
        "5:\n"
        "vmov r6, s2\n"
        "cmp r10, r6\n"
        "bne 4b\n"
        "vmov r6, s3\n"
        "lsls r6, r6, #31\n" /* carry: two are left; not zero: one is */
        "bcc 6f\n" TWO_OUTPUTS(0)
        "add r10, r10, #" TEXT(4 * COLUMN_STRIDE) "\n"
        "6:\n"
        "beq 7f\n" ONE_SUM CODE("r8", "[r11]")
        "7:\n"
        "vmov r0, r11, s8, s9\n"
        "add r0, r0, %[size]\n"
        "add r11, r11, #1\n"
        "vmov r1, s11\n"
        "cmp r0, r1\n"
        "bne 1b\n"
        "pop {r7}\n"
        : "+r"(first), "+r"(last), "+r"(weights), "+r"(out)
        : [size] "i"(sizeof(channel_t))
        : "r2", "r3", "r4", "r5", "r6", "r8", "r10", "r12", "lr", "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s8", "s9",
          "s10", "s11", "cc", "memory");
}

#endif
