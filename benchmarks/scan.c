/* The selective scan of a Mamba block and its gradient, for training on a CPU (train_text.py compiles it).
 *
 *     h_t[n] = exp(delta_t * a[n]) * h_{t-1}[n] + delta_t * x_t * b_t[n],   h_{-1} = 0
 *     y_t    = sum_n c_t[n] * h_t[n]
 *
 * x, delta, y: (batch, time, channels); a: (channels, STATE), negative; b, c: (batch, time, STATE); all float32.
 * The inner loops run over the STATE values of one channel, so that a compiler makes one vector of them.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef STATE
#define STATE 16
#endif

/* exp for arguments of at most 0: 2^(whole) times a polynomial of the rest; relative error below 2e-7 */
static inline float exp_negative(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float whole = floorf(x * 1.44269504f + 0.5f);
    float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f; /* |r| <= ln(2) / 2 */
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.0083333338f + r * 0.0013888889f)))));
    union { int32_t i; float f; } power = { ((int32_t)whole + 127) << 23 };
    return p * power.f;
}

void scan_forward(int64_t batch, int64_t time, int64_t channels, const float *x, const float *delta, const float *a,
                  const float *b, const float *c, float *y)
{
    for (int64_t s = 0; s < batch; s++)
        for (int64_t d = 0; d < channels; d++) {
            float h[STATE] = {0};
            for (int64_t t = 0; t < time; t++) {
                const float *bt = b + (s * time + t) * STATE, *ct = c + (s * time + t) * STATE;
                int64_t at = (s * time + t) * channels + d;
                float dt = delta[at], dx = dt * x[at], sum = 0;
                for (int n = 0; n < STATE; n++) {
                    h[n] = exp_negative(dt * a[d * STATE + n]) * h[n] + dx * bt[n];
                    sum += h[n] * ct[n];
                }
                y[at] = sum;
            }
        }
}

/* `work` holds 2 * (time + 1) * STATE floats. gx and gdelta are written; ga, gb and gc are added to. */
void scan_backward(int64_t batch, int64_t time, int64_t channels, const float *x, const float *delta, const float *a,
                   const float *b, const float *c, const float *gy, float *gx, float *gdelta, float *ga, float *gb,
                   float *gc, float *work)
{
    float *decay = work, *state = work + (time + 1) * STATE; /* state[t + 1] is h_t */
    for (int64_t s = 0; s < batch; s++)
        for (int64_t d = 0; d < channels; d++) {
            const float *ad = a + d * STATE;
            memset(state, 0, STATE * sizeof(float));
            for (int64_t t = 0; t < time; t++) {
                const float *bt = b + (s * time + t) * STATE;
                float *e = decay + t * STATE, *h = state + t * STATE;
                int64_t at = (s * time + t) * channels + d;
                float dt = delta[at], dx = dt * x[at];
                for (int n = 0; n < STATE; n++) {
                    e[n] = exp_negative(dt * ad[n]);
                    h[STATE + n] = e[n] * h[n] + dx * bt[n];
                }
            }
            float g[STATE] = {0}, gad[STATE] = {0}; /* gradients of h_t and of a[d] */
            for (int64_t t = time - 1; t >= 0; t--) {
                const float *bt = b + (s * time + t) * STATE, *ct = c + (s * time + t) * STATE;
                float *gbt = gb + (s * time + t) * STATE, *gct = gc + (s * time + t) * STATE;
                const float *e = decay + t * STATE, *h = state + t * STATE;
                int64_t at = (s * time + t) * channels + d;
                float dt = delta[at], dx = dt * x[at], gyt = gy[at], into = 0, through = 0;
                for (int n = 0; n < STATE; n++) {
                    g[n] += gyt * ct[n];
                    gct[n] += gyt * h[STATE + n];
                    float ge = g[n] * e[n] * h[n]; /* gradient of delta_t * a[n] */
                    through += ge * ad[n];
                    gad[n] += ge * dt;
                    into += g[n] * bt[n];
                    gbt[n] += g[n] * dx;
                    g[n] *= e[n];
                }
                gx[at] = into * dt;
                gdelta[at] = into * x[at] + through;
            }
            for (int n = 0; n < STATE; n++)
                ga[d * STATE + n] += gad[n];
        }
}
