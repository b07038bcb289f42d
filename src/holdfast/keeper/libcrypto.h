/* OpenSSL 3: HMAC and AES-GCM by address, so that keys stay where they are. */
typedef struct evp_md_st EVP_MD;
typedef struct evp_cipher_st EVP_CIPHER;
typedef struct evp_cipher_ctx_st EVP_CIPHER_CTX;
typedef struct engine_st ENGINE;
const EVP_MD *EVP_sha256(void);
const EVP_CIPHER *EVP_aes_256_gcm(void);
unsigned char *HMAC(const EVP_MD *digest, const void *key, int key_size, const unsigned char *data, size_t size, unsigned char *code, unsigned int *code_size);
EVP_CIPHER_CTX *EVP_CIPHER_CTX_new(void);
void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *context);
int EVP_CIPHER_CTX_ctrl(EVP_CIPHER_CTX *context, int type, int argument, void *data);
int EVP_CipherInit_ex(EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, ENGINE *engine, const unsigned char *key, const unsigned char *iv, int encrypt);
int EVP_CipherUpdate(EVP_CIPHER_CTX *context, unsigned char *out, int *out_size, const unsigned char *data, int size);
int EVP_CipherFinal_ex(EVP_CIPHER_CTX *context, unsigned char *out, int *out_size);
