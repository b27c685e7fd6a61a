/* Product with 8-bit weights; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

#define STEP                        \
    "ldrd r2, r3, [r0], #8\n"       \
    "ldrd r12, lr, [r1], #8\n"      \
    "smlad r4, r2, r12, r4\n"       \
    "smlad r8, r2, lr, r8\n"        \
    "sxtb16 r2, r2\n"               \
    "smlad r5, r2, r12, r5\n"       \
    "smlad r9, r2, lr, r9\n"        \
    "smlad r6, r3, r12, r6\n"       \
    "smlad r10, r3, lr, r10\n"      \
    "sxtb16 r3, r3\n"               \
    "smlad r7, r3, r12, r7\n"       \
    "smlad r11, r3, lr, r11\n"

__attribute__((naked)) void planish_product_8(__attribute__((unused)) const planish_product *product,
                                              __attribute__((unused)) const uint32_t *pairs,
                                              __attribute__((unused)) int8_t *y, __attribute__((unused)) int32_t second)
{
    __asm__(PRODUCT_ENTER("96")
            PRODUCT_GROUP
            STEP
            STEP
            LOOP
            "sub r4, r4, r5\n"
            "sub r6, r6, r7\n"
            "sub r8, r8, r9\n"
            "sub r10, r10, r11\n"
            PRODUCT_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_product_8(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second)
{
    planish_product_c(product, pairs, y, second, FORM_8);
}
#endif
