// Waits for pages, as a vCPU does, and prints how long in nanoseconds: of a file that it maps, and of memory whose userfaultfd it gives away as Firecracker does.
//
// usage: fault FILE SOCKET
//
// Of each, it first reads a word of every 16th page, so that none has come along with another, and then writes one.

#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define STRIDE (16 * PAGE)

static uint64_t now(void) {
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void measure(const char *name, volatile uint8_t *memory, size_t size) {
	for (size_t off = 0; off < size; off += STRIDE) {
		uint64_t begin = now();
		(void)memory[off];
		printf("%s %lu\n", name, now() - begin);
	}
	for (size_t off = 0; off < size; off += STRIDE) {
		uint64_t begin = now();
		memory[off] = 1;
		printf("%s_write %lu\n", name, now() - begin);
	}
}

static void give(const char *path, int fd, void *memory, size_t size) {
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	strncpy(addr.sun_path, path, sizeof addr.sun_path - 1);
	int conn = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (conn < 0 || connect(conn, (struct sockaddr *)&addr, sizeof addr))
		err(1, "connect to %s", path);
	char text[200];
	int length = snprintf(text, sizeof text, "[{\"base_host_virt_addr\":%lu,\"size\":%zu,\"offset\":0,\"page_size\":%lu}]", (uintptr_t)memory, size, PAGE);
	struct iovec iov = {text, length};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof fd)];
	} control = {.header = {.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
	memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	if (sendmsg(conn, &message, 0) != length)
		err(1, "give the userfaultfd away");
	close(conn);
}

int main(int argc, char **argv) {
	if (argc != 3)
		errx(2, "usage: fault FILE SOCKET");
	struct stat st;
	int file = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (file < 0 || fstat(file, &st))
		err(1, "open %s", argv[1]);
	void *mapped = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
	void *memory = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (mapped == MAP_FAILED || memory == MAP_FAILED)
		err(1, "map memory");
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE};
	struct uffdio_register range = {.range = {(uintptr_t)memory, st.st_size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &range))
		err(1, "make a userfaultfd");
	give(argv[2], fd, memory, st.st_size);
	measure("mapped", mapped, st.st_size);
	measure("served", memory, st.st_size);
}
