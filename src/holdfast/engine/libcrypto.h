/* OpenSSL 3: its random generator, and its elliptic curves. */
typedef struct bignum_st BIGNUM;
typedef struct bignum_ctx BN_CTX;
typedef struct ec_group_st EC_GROUP;
int RAND_poll(void);
void RAND_add(const void *data, int length, double entropy);
BIGNUM *BN_new(void);
int BN_cmp(const BIGNUM *a, const BIGNUM *b);
EC_GROUP *EC_GROUP_new_curve_GFp(const BIGNUM *p, const BIGNUM *a, const BIGNUM *b, BN_CTX *context);
EC_GROUP *EC_GROUP_new_by_curve_name(int nid);
int EC_GROUP_get_curve(const EC_GROUP *group, BIGNUM *p, BIGNUM *a, BIGNUM *b, BN_CTX *context);
void EC_GROUP_free(EC_GROUP *group);
