/* Product with 4-bit weights; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

/* W: h of two depths */
#define STEP(W)                               \
    "ldrd r12, lr, [r1], #8\n"                \
    "smlad r4, " W ", r12, r4\n"              \
    "smlad r8, " W ", lr, r8\n"               \
    "bic " W ", " W ", #0xF000F000\n"         \
    "smlad r5, " W ", r12, r5\n"              \
    "smlad r9, " W ", lr, r9\n"               \
    "uxtb16 " W ", " W "\n"                   \
    "smlad r6, " W ", r12, r6\n"              \
    "smlad r10, " W ", lr, r10\n"             \
    "and " W ", " W ", #0x000F000F\n"         \
    "smlad r7, " W ", r12, r7\n"              \
    "smlad r11, " W ", lr, r11\n"

__attribute__((naked)) void planish_product_4(__attribute__((unused)) const planish_product *product,
                                              __attribute__((unused)) const uint32_t *pairs,
                                              __attribute__((unused)) int8_t *y, __attribute__((unused)) int32_t second)
{
    __asm__(PRODUCT_ENTER("100")
            PRODUCT_SUMS
            PRODUCT_GROUP
            "ldrd r2, r3, [r0], #8\n"
            STEP("r2")
            STEP("r3")
            LOOP
            "ldrd r2, r3, [sp, #32]\n"
            DIFFERENCES("r4", "r5", "r6", "r7", "r2", "11", "7", "3")
            DIFFERENCES("r8", "r9", "r10", "r11", "r3", "11", "7", "3")
            PRODUCT_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_product_4(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second)
{
    planish_product_c(product, pairs, y, second, FORM_4);
}
#endif
