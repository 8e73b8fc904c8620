// A guest that needs no operating system: it fills memory with a pattern, goes on changing it at a set rate, checks all of it again and again, and ticks on its
// console. It is a 64-bit ELF for the Linux boot protocol as Firecracker follows it: long mode, the first GiB mapped one to one, RSI with the boot parameters.
// With PVH defined it is one for QEMU, which starts it in protected mode (docs/misc/pvh.pandoc of Xen).
//
// Words of the command line: tsc_khz=N, resident=MIB, rate=PAGES_A_SECOND, hot=PERMILLE of the pages that are changed, order=0 (random) or 1 (in sequence),
// words=N of each page that hold the pattern, evenly spread: a power of two up to 512. Where a guest's instructions are emulated, all of them take long.
//
// Lines of the console, numbers in hexadecimal of eight digits:
//   t SEQ                  a tick, every 10 ms; none is left out
//   p PASS PAGES B0 … BF   all pages were checked; Bi counts the silences between two looks at the clock of 2^i times 64 µs or more, since the start
//   b PAGE HAS             a page is not what it should be
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

static inline void outb(u32 port, u8 v) { __asm__ volatile("outb %0, %w1" : : "a"(v), "Nd"(port)); }
static inline u64 rdtsc(void) { u32 a, d; __asm__ volatile("rdtsc" : "=a"(a), "=d"(d) : : "memory"); return (u64)d << 32 | a; }

static void put(char c) { outb(0x3f8, c); }
static void number(u32 n) { put(' '); for (int i = 28; i >= 0; i -= 4) put("0123456789abcdef"[n >> i & 15]); }

static u64 argument(const char *line, const char *key, u64 otherwise) {
	for (; *line; line++) {
		const char *l = line, *k = key;
		while (*k && *l == *k) l++, k++;
		if (*k || *l != '=') continue;
		u64 n = 0;
		for (l++; *l >= '0' && *l <= '9'; l++) n = n * 10 + (*l - '0');
		return n;
	}
	return otherwise;
}

#define BASE (16ul << 20)
#define WORDS 512

static u32 versions[1 << 18]; // of each page
static u32 stalls[16];
static u64 last, shortest;

// look notes how long the guest was not there.
static u64 look(void) {
	u64 now = rdtsc(), gone = now - last;
	last = now;
	if (gone >= shortest) {
		int i = 0;
		while (i < 15 && gone >= shortest << (i + 1)) i++;
		stalls[i]++;
	}
	return now;
}

static u64 word(u32 page, u32 version, u32 i) {
	u64 x = ((u64)page << 32 | version) + (u64)i * 0x9e3779b97f4a7c15ul;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ul;
	return x ^ x >> 27;
}

static u32 step = 1;

static void fill(u32 page) {
	u32 v = ++versions[page];
	volatile u64 *w = (u64 *)(BASE + (u64)page * 4096);
	for (u32 i = 0; i < WORDS; i += step) w[i] = word(page, v, i);
}

static void check(u32 page) {
	u32 v = versions[page];
	volatile u64 *w = (u64 *)(BASE + (u64)page * 4096);
	for (u32 i = 0; i < WORDS; i += step)
		if (w[i] != word(page, v, i)) {
			put('b'); number(page); number(w[i]); put('\n');
			return;
		}
}

__attribute__((used)) void start(u8 *parameters) {
	const char *line = (const char *)(u64)*(u32 *)(parameters + 0x228); // hdr.cmd_line_ptr, Documentation/arch/x86/boot.rst of Linux
	u64 khz = argument(line, "tsc_khz", 2000000), pages = argument(line, "resident", 16) * 256;
	u64 rate = argument(line, "rate", 1000), hot = argument(line, "hot", 1000), sequence = argument(line, "order", 0);
	u64 tick = khz * 10, span = pages * hot / 1000;
	shortest = khz * 64 / 1000;
	step = WORDS / argument(line, "words", WORDS);
	if (span == 0) span = 1;
	for (u32 p = 0; p < pages; p++) fill(p);
	put('r'); put('\n');
	last = rdtsc();
	u64 begin = last, changed = 0, random = 88172645463325252ul;
	u32 sequenceNumber = 0, pass = 0, checked = 0;
	for (;;) {
		u64 now = look();
		if (now - begin >= (sequenceNumber + 1ul) * tick) {
			put('t'); number(sequenceNumber++); put('\n');
		}
		// In what is left of a tick, the pages that are due are changed, and others checked.
		u64 due = (now - begin) / khz * rate / 1000;
		if (changed < due) {
			random ^= random << 13; random ^= random >> 7; random ^= random << 17;
			fill((sequence ? changed : random) % span);
			changed++;
			if (due - changed > rate) changed = due; // it was away: what it could not do is left out
			continue;
		}
		check(checked++);
		if (checked == pages) {
			checked = 0;
			put('p'); number(pass++); number(pages);
			for (int i = 0; i < 16; i++) number(stalls[i]);
			put('\n');
			last = rdtsc(); // a console is slow
		}
	}
}

__asm__(".pushsection .text.entry,\"ax\"\n.globl entry\nentry:\n\tmovq %rsi, %rdi\n\tleaq stack_end(%rip), %rsp\n\tcall start\n.popsection\n"
	".pushsection .bss\n.align 16\n.skip 16384\nstack_end:\n.popsection\n");

#ifdef PVH
__asm__(".pushsection .note.pvh,\"a\",@note\n.align 4\n.long 4, 8, 18\n.asciz \"Xen\"\n.quad pvh\n.popsection\n" // XEN_ELFNOTE_PHYS32_ENTRY
	".pushsection .data\n.align 4096\npml4: .quad pdpt + 3\n.fill 511, 8, 0\npdpt: .quad pd + 3\n.fill 511, 8, 0\n"
	"pd: .set address, 0\n.rept 512\n.quad address + 0x83\n.set address, address + 0x200000\n.endr\n"
	"gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff\ngdtr: .word 23\n.long gdt\n"
	"parameters: .fill 4096\n.popsection\n"
	".pushsection .text\n.code32\npvh:\n\tcli\n\tmovl 24(%ebx), %eax\n\tmovl %eax, parameters + 0x228\n" // hvm_start_info.cmdline_paddr
	"\tmovl $pml4, %eax\n\tmovl %eax, %cr3\n\tmovl %cr4, %eax\n\torl $0x20, %eax\n\tmovl %eax, %cr4\n" // physical address extension
	"\tmovl $0xc0000080, %ecx\n\trdmsr\n\torl $0x100, %eax\n\twrmsr\n" // long mode
	"\tmovl %cr0, %eax\n\torl $0x80000000, %eax\n\tmovl %eax, %cr0\n\tlgdt gdtr\n\tljmp $8, $pvh64\n"
	".code64\npvh64:\n\tmovl $16, %eax\n\tmovl %eax, %ds\n\tmovl %eax, %es\n\tmovl %eax, %ss\n\tleaq parameters(%rip), %rsi\n\tjmp entry\n.popsection\n");
#endif
