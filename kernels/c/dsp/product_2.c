/* Product with 2-bit weights; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

/* W: the numbers of two depths */
#define STEP(W)                               \
    "ldrd r12, lr, [r1], #8\n"                \
    "smlad r4, " W ", r12, r4\n"              \
    "smlad r8, " W ", lr, r8\n"               \
    "and " W ", " W ", #0x003F003F\n"         \
    "smlad r5, " W ", r12, r5\n"              \
    "smlad r9, " W ", lr, r9\n"               \
    "and " W ", " W ", #0x000F000F\n"         \
    "smlad r6, " W ", r12, r6\n"              \
    "smlad r10, " W ", lr, r10\n"             \
    "and " W ", " W ", #0x00030003\n"         \
    "smlad r7, " W ", r12, r7\n"              \
    "smlad r11, " W ", lr, r11\n"

__attribute__((naked)) void planish_product_2(__attribute__((unused)) const planish_product *product,
                                              __attribute__((unused)) const uint32_t *pairs,
                                              __attribute__((unused)) int8_t *y, __attribute__((unused)) int32_t second)
{
    __asm__(PRODUCT_ENTER("108")
            PRODUCT_SUMS
            PRODUCT_GROUP
            "ldr r2, [r0], #4\n"
            "sxtb16 r3, r2\n"
            STEP("r3")
            "sxtb16 r2, r2, ror #8\n"
            STEP("r2")
            LOOP
            "ldrd r2, r3, [sp, #32]\n"
            DIFFERENCES("r4", "r5", "r6", "r7", "r2", "5", "3", "1")
            DIFFERENCES("r8", "r9", "r10", "r11", "r3", "5", "3", "1")
            PRODUCT_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_product_2(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second)
{
    planish_product_c(product, pairs, y, second, FORM_2);
}
#endif
