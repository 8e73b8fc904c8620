// The load of a guest for benchmarks: holds resident pages of incompressible content, writes to pages at a set rate, and tells the outside every 10 ms that it
// runs, by a datagram with the number of its writes so far and by a character on the console. Arguments: resident MiB, MiB of pages written per second (0: as many as it can), which pages ("random", "hot": nine of ten in a
// tenth of them, "sequential"), IPv4 address and UDP port to tell. TCP port 7 is open once the pages are there.
#include <arpa/inet.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static uint64_t x = 88172645463325252ull;

static uint64_t next(void) { // xorshift64, Marsaglia 2003
	x ^= x << 13;
	x ^= x >> 7;
	return x ^= x << 17;
}

static uint64_t pages, at;

static uint64_t page(char pattern) {
	switch (pattern) {
	case 's':
		return at++ % pages;
	case 'h':
		if (next() % 10)
			return next() % (pages / 10);
	}
	return next() % pages;
}

// before tells whether a time is less than so many nanoseconds after another.
static int before(struct timespec *at, struct timespec *from, long ns) {
	return (at->tv_sec - from->tv_sec) * 1000000000l + at->tv_nsec - from->tv_nsec < ns;
}

int main(int argc, char **argv) {
	if (argc != 6)
		return 2;
	pages = strtoull(argv[1], 0, 10) << 8;
	uint64_t per_tick = (strtoull(argv[2], 0, 10) << 8) / 100;
	uint64_t *memory = mmap(0, pages << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	for (uint64_t i = 0; i < pages << 9; i++)
		memory[i] = next();
	int s = socket(AF_INET, SOCK_DGRAM, 0);
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[5]))};
	if (s < 0 || inet_pton(AF_INET, argv[4], &to.sin_addr) != 1)
		return 1;
	int ready = socket(AF_INET, SOCK_STREAM, 0);
	struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(7)};
	if (ready < 0 || bind(ready, (struct sockaddr *)&here, sizeof here) || listen(ready, 8))
		return 1;
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	uint64_t writes = 0;
	for (uint64_t tick = 0;; tick++) {
		for (uint64_t i = 0; i < per_tick; i++)
			memory[page(*argv[3]) << 9] = tick;
		writes += per_tick;
		for (struct timespec now = t; per_tick == 0 && before(&now, &t, 10000000); clock_gettime(CLOCK_MONOTONIC, &now), writes += 1000)
			for (int i = 0; i < 1000; i++)
				memory[page(*argv[3]) << 9] = tick;
		sendto(s, &writes, sizeof writes, 0, (struct sockaddr *)&to, sizeof to); // nobody may listen
		if (write(1, ".", 1) != 1)
			return 1;
		t.tv_nsec += 10000000;
		if (t.tv_nsec >= 1000000000)
			t.tv_nsec -= 1000000000, t.tv_sec++;
		struct timespec now;
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec > t.tv_sec || (now.tv_sec == t.tv_sec && now.tv_nsec > t.tv_nsec))
			t = now; // late: do not catch up
		else
			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0);
	}
}
