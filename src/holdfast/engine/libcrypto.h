/* OpenSSL 3: its random generator. */
int RAND_poll(void);
void RAND_add(const void *data, int length, double entropy);
