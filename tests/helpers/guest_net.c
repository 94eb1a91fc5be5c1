/* What a guest of the tests says on its network that busybox can't say: frames made by hand, and UDP.
 *
 *   guest_net send IFACE COUNT [OFFSET]   sends the frames that standard input has, one in hexadecimal a line, COUNT times;
 *                                         with an offset the turn's number is in the two bytes there
 *   guest_net hear IFACE SECONDS          prints each frame that arrives, in hexadecimal
 *   guest_net echo PORT                   sends UDP packets back to where they come from, for ever
 *   guest_net ask ADDRESS PORT            sends `hello` by UDP and prints the answer, if one comes in two seconds
 */
#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int failed(const char *what) {
    perror(what);
    return 1;
}

static int packets(const char *interface) {
    int link = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
    struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL)};
    at.sll_ifindex = if_nametoindex(interface);
    return link < 0 || bind(link, (struct sockaddr *)&at, sizeof at) ? -1 : link;
}

static int send_frames(const char *interface, long count, int offset) {
    static unsigned char frames[64][2048];
    static char line[5000];
    size_t lengths[64], number = 0;
    int link = packets(interface);
    if (link < 0) return failed("packet socket");
    while (number < 64 && fgets(line, sizeof line, stdin)) {
        size_t length = strcspn(line, "\n") / 2;
        for (size_t i = 0; i < length; i++) sscanf(line + 2 * i, "%2hhx", &frames[number][i]);
        lengths[number++] = length;
    }
    for (long turn = 0; turn < count; turn++)
        for (size_t i = 0; i < number; i++) {
            if (offset) frames[i][offset] = turn >> 8, frames[i][offset + 1] = turn;
            while (send(link, frames[i], lengths[i], 0) < 0) usleep(1000);
        }
    return 0;
}

static int hear(const char *interface, int seconds) {
    static unsigned char frame[65536];
    struct timeval patience = {.tv_sec = 0, .tv_usec = 100000};
    time_t end = time(NULL) + seconds;
    int link = packets(interface);
    if (link < 0) return failed("packet socket");
    setsockopt(link, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    while (time(NULL) < end) {
        struct sockaddr_ll from;
        socklen_t size = sizeof from;
        ssize_t length = recvfrom(link, frame, sizeof frame, 0, (struct sockaddr *)&from, &size);
        if (length <= 0 || from.sll_pkttype == PACKET_OUTGOING) continue;
        for (ssize_t i = 0; i < length; i++) printf("%02x", frame[i]);
        printf("\n");
    }
    return 0;
}

static int udp(const char *address, int port) {
    struct sockaddr_in6 to = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    struct timeval patience = {.tv_sec = 2};
    char text[2048];
    int link = socket(AF_INET6, SOCK_DGRAM, 0);
    if (!address) {
        if (bind(link, (struct sockaddr *)&to, sizeof to)) return failed("bind");
        for (;;) {
            struct sockaddr_storage from;
            socklen_t size = sizeof from;
            ssize_t length = recvfrom(link, text, sizeof text, 0, (struct sockaddr *)&from, &size);
            if (length >= 0) sendto(link, text, length, 0, (struct sockaddr *)&from, size);
        }
    }
    setsockopt(link, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    snprintf(text, sizeof text, "%s%s", strchr(address, ':') ? "" : "::ffff:", address);
    if (inet_pton(AF_INET6, text, &to.sin6_addr) != 1) return failed("address");
    if (sendto(link, "hello", 5, 0, (struct sockaddr *)&to, sizeof to) < 0) return failed("send");
    ssize_t length = recv(link, text, sizeof text, 0);
    if (length > 0) printf("%.*s\n", (int)length, text);
    return length <= 0;
}

int main(int count, char **words) {
    const char *what = count > 1 ? words[1] : "";
    if (!strcmp(what, "send") && count > 3) return send_frames(words[2], atol(words[3]), count > 4 ? atoi(words[4]) : 0);
    if (!strcmp(what, "hear") && count > 3) return hear(words[2], atoi(words[3]));
    if (!strcmp(what, "echo") && count > 2) return udp(NULL, atoi(words[2]));
    if (!strcmp(what, "ask") && count > 3) return udp(words[2], atoi(words[3]));
    fprintf(stderr, "see the beginning of guest_net.c\n");
    return 2;
}
