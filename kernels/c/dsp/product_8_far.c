/* Product with 8-bit weights whose sums may be of any size; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

/* the next two outputs' weights with the sums HIGH_A and LOW_A of the first column, HIGH_B and LOW_B of the second */
#define STEP(HIGH_A, LOW_A, HIGH_B, LOW_B)          \
    "ldr r2, [r0], #4\n"                            \
    "sxtb16 r3, r2, ror #8\n"                       \
    "smlad " HIGH_A ", r3, r12, " HIGH_A "\n"       \
    "smlad " HIGH_B ", r3, lr, " HIGH_B "\n"        \
    "sxtb16 r2, r2\n"                               \
    "smlad " LOW_A ", r2, r12, " LOW_A "\n"         \
    "smlad " LOW_B ", r2, lr, " LOW_B "\n"

__attribute__((naked)) void planish_product_8_far(__attribute__((unused)) const planish_product *product,
                                                  __attribute__((unused)) const uint32_t *pairs,
                                                  __attribute__((unused)) int8_t *y,
                                                  __attribute__((unused)) int32_t second)
{
    __asm__(PRODUCT_ENTER("120")
            PRODUCT_GROUP
            "ldrd r12, lr, [r1], #8\n"
            STEP("r4", "r5", "r8", "r9")
            STEP("r6", "r7", "r10", "r11")
            "ldrd r12, lr, [r1], #8\n"
            STEP("r4", "r5", "r8", "r9")
            STEP("r6", "r7", "r10", "r11")
            LOOP
            PRODUCT_FAR_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_product_8_far(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second)
{
    planish_product_c(product, pairs, y, second, FORM_8_FAR);
}
#endif
