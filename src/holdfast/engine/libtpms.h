/* libtpms 0.9 and newer, as far as we call it (tpm_library.h, tpm_tis.h).
   A function is looked up when it is first used: TPMLIB_SetProfile is there from 0.10 on. */
typedef uint32_t TPM_RESULT;
struct libtpms_callbacks {
    int sizeOfStruct;
    TPM_RESULT (*nvram_init)(void);
    TPM_RESULT (*loaddata)(unsigned char **data, uint32_t *length, uint32_t tpm, const char *name);
    TPM_RESULT (*storedata)(const unsigned char *data, uint32_t length, uint32_t tpm,
                            const char *name);
    TPM_RESULT (*deletename)(uint32_t tpm, const char *name, unsigned char must_exist);
    TPM_RESULT (*io_init)(void);
    TPM_RESULT (*io_getlocality)(uint32_t *locality, uint32_t tpm);
    TPM_RESULT (*io_getphysicalpresence)(unsigned char *presence, uint32_t tpm);
};
uint32_t TPMLIB_GetVersion(void);
TPM_RESULT TPMLIB_ChooseTPMVersion(int version);
TPM_RESULT TPMLIB_RegisterCallbacks(struct libtpms_callbacks *);
TPM_RESULT TPMLIB_MainInit(void);
void TPMLIB_Terminate(void);
TPM_RESULT TPMLIB_Process(unsigned char **response, uint32_t *size, uint32_t *buffer_size,
                          unsigned char *command, uint32_t command_size);
TPM_RESULT TPMLIB_CancelCommand(void);
TPM_RESULT TPMLIB_SetState(int type, const unsigned char *data, uint32_t length);
TPM_RESULT TPMLIB_GetState(int type, unsigned char **data, uint32_t *length);
char *TPMLIB_GetInfo(uint32_t flags);
TPM_RESULT TPMLIB_SetProfile(const char *profile);
TPM_RESULT TPM_IO_Hash_Start(void);
TPM_RESULT TPM_IO_Hash_Data(const unsigned char *data, uint32_t length);
TPM_RESULT TPM_IO_Hash_End(void);
TPM_RESULT TPM_IO_TpmEstablished_Get(unsigned char *established);
TPM_RESULT TPM_IO_TpmEstablished_Reset(void);
uint32_t TPMLIB_SetBufferSize(uint32_t wanted, uint32_t *least, uint32_t *most);
void *malloc(size_t);
void free(void *);
