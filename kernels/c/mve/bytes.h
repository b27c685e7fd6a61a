/* Runs of bytes with MVE, any length. */
#ifndef PLANISH_MVE_BYTES_H
#define PLANISH_MVE_BYTES_H

#include <stdint.h>

#if defined(__ARM_FEATURE_MVE)
#include <arm_mve.h>

static inline void copy_bytes(int8_t *to, const int8_t *from, int32_t size)
{
    __asm__ volatile(
        "wlstp.8 lr, %2, 2f\n"
        "1:\n"
        "vldrb.u8 q0, [%1], #16\n"
        "vstrb.8 q0, [%0], #16\n"
        "letp lr, 1b\n"
        "2:\n"
        : "+r"(to), "+r"(from)
        : "r"(size)
        : "memory", "cc", "lr", "q0");
}

static inline void fill_bytes(int8_t *to, int32_t value, int32_t size)
{
    __asm__ volatile(
        "vdup.8 q0, %1\n"
        "wlstp.8 lr, %2, 2f\n"
        "1:\n"
        "vstrb.8 q0, [%0], #16\n"
        "letp lr, 1b\n"
        "2:\n"
        : "+r"(to)
        : "r"(value), "r"(size)
        : "memory", "cc", "lr", "q0");
}

#else

static inline void copy_bytes(int8_t *to, const int8_t *from, int32_t size)
{
    while (size-- > 0) {
        *to++ = *from++;
    }
}

static inline void fill_bytes(int8_t *to, int32_t value, int32_t size)
{
    while (size-- > 0) {
        *to++ = (int8_t)value;
    }
}

#endif

#endif
