/* What Python's own modules do at several times the price (accept(2)). */
int accept4(int sockfd, void *addr, void *addrlen, int flags);
