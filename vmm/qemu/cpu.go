package qemu

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// modelForm lists the CPU models that a VM may have: those of QEMU that name a processor ("-cpu
// help"), with their versions, and the levels of the x86-64 psABI. "host" and "max" are excluded,
// because they differ on the next host.
var modelForm = regexp.MustCompile(`^(486|Broadwell|Cascadelake-Server|ClearwaterForest|Conroe|Cooperlake|Denverton|Dhyana|EPYC|EPYC-(Genoa|Milan|Rome|Turin)|GraniteRapids|` +
	`Haswell|Icelake-Server|IvyBridge|KnightsMill|Nehalem|Opteron_G[1-5]|Penryn|SandyBridge|SapphireRapids|SierraForest|Skylake-(Client|Server)|Snowridge|Westmere|YongFeng|` +
	`athlon|core2duo|coreduo|kvm32|kvm64|n270|pentium[23]?|phenom|qemu32|qemu64|x86-64-v[1-4])(-noTSX)?(-IB(RS|PB))?(-AES)?(-v[0-9]{1,2})?$`)

// features are the CPU features that QEMU knows ("-cpu help"), without those that let a guest reach
// more of its host than its own instructions: nested virtualization, interfaces of the hypervisor,
// counters and traces, enclaves.
var features = strings.Fields(`
	3dnow 3dnowext 3dnowprefetch abm ace2 ace2-en acpi adx aes amd-no-ssb amd-ssbd amd-stibp
	amx-bf16 amx-int8 amx-tile apic arat arch-capabilities avx avx-vnni avx2 avx512-4fmaps
	avx512-4vnniw avx512-bf16 avx512-fp16 avx512-vp2intersect avx512-vpopcntdq avx512bitalg
	avx512bw avx512cd avx512dq avx512er avx512f avx512ifma avx512pf avx512vbmi avx512vbmi2
	avx512vl avx512vnni bmi1 bmi2 bus-lock-detect cid cldemote clflush clflushopt clwb clzero cmov
	cmp-legacy core-capability cr8legacy cx16 cx8 dca de erms est extapic f16c fma fma4 fpu
	fsgsbase fsrm full-width-write fxsr fxsr-opt gfni hle ht ibpb ibrs ibrs-all invpcid invtsc
	la57 lahf-lm lm mca mce md-clear mds-no misalignsse mmx mmxext movbe movdir64b movdiri mpx
	mtrr nodeid-msr nx osvw pae pat pbe pcid pclmulqdq pcommit pdpe1gb pge phe phe-en pks pku pn
	pni popcnt pschange-mc-no pse pse36 rdctl-no rdpid rdrand rdseed rdtscp rsba rtm sep serialize
	sha-ni smap smep smx spec-ctrl split-lock-detect ss ssb-no ssbd sse sse2 sse4.1 sse4.2 sse4a
	ssse3 stibp syscall taa-no tbm tce tm tm2 topoext tsc tsc-adjust tsc-deadline tsx-ctrl
	tsx-ldtrk umip vaes virt-ssbd vme vpclmulqdq wbnoinvd x2apic xcrypt xcrypt-en xfd xgetbv1 xop
	xsave xsavec xsaveerptr xsaveopt xsaves xstore xstore-en xtpr
`)

// withoutVirtualization follows every model, because some have it. A guest that ran guests could
// not be moved, and would reach the host's code for nested virtualization.
const withoutVirtualization = ",vmx=off,svm=off"

// featureForm is how a feature is switched.
var featureForm = regexp.MustCompile(`^([+-][a-z0-9.-]+|[a-z0-9.-]+=(on|off))$`)

// checkCPU refuses what is not an allowed CPU model with allowed features that are on or off.
func checkCPU(cpu string) error {
	model, rest, more := strings.Cut(cpu, ",")
	if !modelForm.MatchString(model) {
		return fmt.Errorf("CPU model %.80q is not one that a VM may have; see '-cpu help' of QEMU for models that name a processor", model)
	}
	if !more {
		return nil
	}
	for feature := range strings.SplitSeq(rest, ",") {
		name, _, _ := strings.Cut(strings.TrimLeft(feature, "+-"), "=")
		if !featureForm.MatchString(feature) || !slices.Contains(features, strings.ReplaceAll(name, "_", "-")) {
			return fmt.Errorf("CPU feature %.80q is not one that a VM may have; write features as +avx2, -avx2 or avx2=on", feature)
		}
	}
	return nil
}
