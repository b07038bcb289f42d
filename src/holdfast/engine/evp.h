/* OpenSSL 3, as far as it shows which algorithms its configuration allows (evp.h). */
void *EVP_CIPHER_fetch(void *context, const char *name, const char *properties);
void EVP_CIPHER_free(void *cipher);
void *EVP_PKEY_Q_keygen(void *context, const char *properties, const char *type, ...);
void EVP_PKEY_free(void *key);
void *EVP_PKEY_CTX_new(void *key, void *engine);
void EVP_PKEY_CTX_free(void *);
int EVP_PKEY_CTX_ctrl_str(void *, const char *name, const char *value);
int EVP_PKEY_sign_init(void *);
int EVP_PKEY_sign(void *, unsigned char *made, size_t *made_size, const unsigned char *,
                  size_t size);
int EVP_PKEY_verify_init(void *);
int EVP_PKEY_encrypt_init(void *);
int EVP_PKEY_encrypt(void *, unsigned char *made, size_t *made_size, const unsigned char *,
                     size_t size);
unsigned char *EVP_Q_mac(void *context, const char *name, const char *properties,
                         const char *algorithm, const void *parameters, const void *key,
                         size_t key_size, const unsigned char *data, size_t size,
                         unsigned char *made, size_t room, size_t *made_size);
