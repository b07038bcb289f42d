/* What Python does not offer, or at several times the price (accept(2)). */
struct sock_fprog {
    unsigned short len;
    void *filter;
};
int accept4(int sockfd, void *addr, void *addrlen, int flags);
int prctl(int option, unsigned long arg2, unsigned long arg3, unsigned long arg4, unsigned long arg5);
int capset(void *header, void *data);
int mlockall(int flags);
int unshare(int flags);
int setns(int fd, int nstype);
