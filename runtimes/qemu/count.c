/* QEMU TCG plugin (API version 1: QEMU 5 to 8): exact instruction counts between marks in the guest.
 *
 * A mark is the AArch64 instruction `hint #112` ... `hint #115`: architecturally a no-op, and used by nothing else. Each
 * executed mark prints "MARK <0..3> <instructions before it>". The prototypes below are declared here from the plugin
 * API's documentation, so that no QEMU header is needed. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef uint64_t plugin_id;
enum callback_flags { NO_REGISTERS };

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), enum callback_flags, void *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *), enum callback_flags, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
void qemu_plugin_outs(const char *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

#define HINT_112 0xd5032e1fu /* hint #n is 0xd503201f with n in bits 5..11 */

static uint64_t total; /* instructions of all translation blocks entered so far */

typedef struct {
    unsigned id;    /* 0..3 */
    uint64_t after; /* instructions of its block from the mark on, which `total` already holds */
} mark;

static void on_block(unsigned cpu, void *count) {
    (void)cpu;
    total += (uint64_t)(uintptr_t)count;
}

static void on_mark(unsigned cpu, void *data) {
    const mark *m = data;
    char line[64];
    (void)cpu;
    snprintf(line, sizeof line, "MARK %u %" PRIu64 "\n", m->id, total - m->after);
    qemu_plugin_outs(line);
}

static void on_translate(plugin_id id, struct qemu_plugin_tb *tb) {
    const size_t count = qemu_plugin_tb_n_insns(tb);
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, NO_REGISTERS, (void *)(uintptr_t)count);
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(insn), sizeof word);
        if (word < HINT_112 || word > HINT_112 + (3u << 5) || (word - HINT_112) % 32u) continue;
        mark *m = malloc(sizeof *m); /* lives as long as the translation: for the whole run */
        if (!m) continue;
        m->id = (word - HINT_112) / 32u;
        m->after = count - i;
        qemu_plugin_register_vcpu_insn_exec_cb(insn, on_mark, NO_REGISTERS, m);
    }
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
    return 0;
}
