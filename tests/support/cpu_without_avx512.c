/* Make this CPU look like one with AVX2 and no AVX-512, VNNI or AMX, at native speed.

   Exit code 77: this CPU or kernel cannot. x86-64 Linux only. Linux can let CPUID fault (arch_prctl ARCH_SET_CPUID); the handler below answers it with those bits cleared, so every
   library that asks the processor picks its AVX2 kernels. Preloaded: LD_PRELOAD=./cpu_without_avx512.so python ...
   Bits: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2A, CPUID, leaf 07H. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

/* AVX-512 in its kinds, VNNI, bfloat16, float16, AMX. */
static const uint32_t EBX_7_0 = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31);
static const uint32_t ECX_7_0 = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);
static const uint32_t EDX_7_0 = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25);
static const uint32_t EAX_7_1 = BIT(4) | BIT(5) | BIT(21) | BIT(23);
static const uint32_t EDX_7_1 = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19);

typedef int sigaction_function(int, const struct sigaction *, struct sigaction *);
static struct sigaction chained;

static void set_cpuid(unsigned long allowed) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, allowed); }

static sigaction_function *real_sigaction(void) {
    static sigaction_function *found;
    if (!found) found = (sigaction_function *)dlsym(RTLD_NEXT, "sigaction");
    return found;
}

static void on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
    /* A general protection fault has no address; a jump to nowhere has, and must not be read. */
    if (info->si_code == SI_KERNEL && instruction[0] == 0x0f && instruction[1] == 0xa2) {
        uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX], a, b, c, d;
        set_cpuid(1);
        __cpuid_count(leaf, subleaf, a, b, c, d);
        set_cpuid(0);
        if (leaf == 7 && subleaf == 0) b &= ~EBX_7_0, c &= ~ECX_7_0, d &= ~EDX_7_0;
        if (leaf == 7 && subleaf == 1) a &= ~EAX_7_1, d &= ~EDX_7_1;
        registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
        registers[REG_RIP] += 2;
        return;
    }
    if (chained.sa_flags & SA_SIGINFO) {
        chained.sa_sigaction(number, info, context);
    } else if (chained.sa_handler != SIG_DFL && chained.sa_handler != SIG_IGN) {
        chained.sa_handler(number);
    } else {
        struct sigaction fatal = {.sa_handler = SIG_DFL};
        real_sigaction()(number, &fatal, NULL); /* returns to the faulting instruction, which then ends the process */
    }
}

/* Others may ask to handle SIGSEGV (faulthandler does): they are called after us, never in place of us. */
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    if (number != SIGSEGV) return real_sigaction()(number, action, old);
    if (old) *old = chained;
    if (action) chained = *action;
    return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
    struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
    if (sigaction(number, &action, &old)) return SIG_ERR;
    return old.sa_handler;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (real_sigaction()(SIGSEGV, &action, NULL) || syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0UL)) {
        fputs("cannot hide AVX-512: this CPU or kernel has no CPUID faulting\n", stderr);
        exit(77);
    }
}
