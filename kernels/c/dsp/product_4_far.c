/* Product with 4-bit weights whose sums may be of any size; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

#define STEP                            \
    "ldr r2, [r0], #4\n"                \
    "ldrd r12, lr, [r1], #8\n"          \
    "sxtb16 r3, r2\n"                   \
    "smlad r4, r3, r12, r4\n"           \
    "smlad r8, r3, lr, r8\n"            \
    "and r3, r3, #0x000F000F\n"         \
    "smlad r5, r3, r12, r5\n"           \
    "smlad r9, r3, lr, r9\n"            \
    "sxtb16 r2, r2, ror #8\n"           \
    "smlad r6, r2, r12, r6\n"           \
    "smlad r10, r2, lr, r10\n"          \
    "and r2, r2, #0x000F000F\n"         \
    "smlad r7, r2, r12, r7\n"           \
    "smlad r11, r2, lr, r11\n"

__attribute__((naked)) void planish_product_4_far(__attribute__((unused)) const planish_product *product,
                                                  __attribute__((unused)) const uint32_t *pairs,
                                                  __attribute__((unused)) int8_t *y,
                                                  __attribute__((unused)) int32_t second)
{
    __asm__(PRODUCT_ENTER("112")
            PRODUCT_SUMS
            PRODUCT_GROUP
            STEP
            STEP
            LOOP
            "ldrd r2, r3, [sp, #32]\n"
            DIFFERENCE("r4", "r5", "r2", "3")
            DIFFERENCE("r6", "r7", "r2", "3")
            DIFFERENCE("r8", "r9", "r3", "3")
            DIFFERENCE("r10", "r11", "r3", "3")
            PRODUCT_FAR_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_product_4_far(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second)
{
    planish_product_c(product, pairs, y, second, FORM_4_FAR);
}
#endif
