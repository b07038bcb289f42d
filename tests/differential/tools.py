"""What tpm2-tools do in each recorded stream. `no` is before what the TPM must refuse.

tpm2-tools leave objects in a TPM that has no resource manager, so `T`, which runs a tool, takes
them out afterwards, as their users do.
"""

from __future__ import annotations

PRELUDE = r"""
bad() { echo "$*" >> ../problems; }
S() { tpm2 "$@" > out.txt 2> err.txt || bad "refused: $* $(cat err.txt)"; }
T() { S "$@"; tpm2 flushcontext -Q -t; }
no() { if tpm2 "$@" > /dev/null 2>&1; then bad "not refused: $*"; fi; tpm2 flushcontext -Q -t; }
may() { tpm2 "$@" > /dev/null 2>&1; tpm2 flushcontext -Q -t; }
key() {
    name=$1; shift
    T create -C p.ctx -u $name.pub -r $name.priv "$@"
    T load -C p.ctx -u $name.pub -r $name.priv -c $name.ctx
}
primary() { T createprimary -C o -G ecc -c p.ctx; }
echo -n "some data" > data
head -c 32 /dev/zero > digest
head -c 32 /dev/zero > cphash
head -c 3000 /dev/zero > big
"""

KEYS = r"""
primary
T createprimary -C e -G ecc -c e.ctx
T createprimary -C n -G ecc -c n.ctx
T createprimary -C p -G ecc -c pp.ctx -p secret
T createprimary -C o -G rsa -c rsa.ctx
T createprimary -C o -G aes -c aes.ctx
T createprimary -C o -G ecc384 -c e384.ctx
no createprimary -C o -P wrong -G ecc -c no.ctx
no createprimary -C o -G ecc -a "restricted|sign|decrypt|userwithauth" -c no.ctx
T create -C p.ctx -G ecc -u k.pub -r k.priv -p keyauth
T load -C p.ctx -u k.pub -r k.priv -c k.ctx
T readpublic -c k.ctx -o k.pem -f pem
no load -C e.ctx -u k.pub -r k.priv -c no.ctx
T create -C p.ctx -G rsa2048:rsapss:null -u r.pub -r r.priv
T load -C p.ctx -u r.pub -r r.priv -c r.ctx
T create -C p.ctx -G aes128cfb -u a.pub -r a.priv
T load -C p.ctx -u a.pub -r a.priv -c a.ctx
T create -C p.ctx -G hmac -u h.pub -r h.priv
T create -C p.ctx -i data -u s.pub -r s.priv -p sealauth
T load -C p.ctx -u s.pub -r s.priv -c s.ctx
T unseal -c s.ctx -p sealauth
no unseal -c s.ctx -p wrong
no unseal -c k.ctx -p keyauth
T changeauth -C p.ctx -c s.ctx -p sealauth -r s2.priv newauth
T load -C p.ctx -u s.pub -r s2.priv -c s2.ctx
T unseal -c s2.ctx -p newauth
no changeauth -C p.ctx -c s.ctx -p wrong -r s3.priv newauth
T evictcontrol -C o -c k.ctx 0x81000010
T readpublic -c 0x81000010
no evictcontrol -C o -c k.ctx 0x81000010
no evictcontrol -C o -c k.ctx 0x81800010
T evictcontrol -C o -c 0x81000010
no evictcontrol -C o -c 0x81000010
no readpublic -c 0x81000011
T loadexternal -C n -G ecc -u k.pem -c x.ctx
openssl genrsa -out x.pem 2048 2>/dev/null
T loadexternal -C n -G rsa -r x.pem -c x.ctx
key l -G ecc
may create -C aes.ctx -G ecc -u no.pub -r no.priv
no flushcontext 0x80000000
T testparms rsa2048:rsassa:aes128cfb
no testparms rsa512
T testparms ecc256:ecdsa
may testparms ecc224:ecdsa
"""

CRYPT = r"""
primary
key k -G ecc
T sign -c k.ctx -g sha256 -o sig data
T verifysignature -c k.ctx -g sha256 -m data -s sig
no verifysignature -c k.ctx -g sha256 -m big -s sig
key r -G rsa2048
T sign -c r.ctx -g sha256 -s rsassa -o sig data
T verifysignature -c r.ctx -g sha256 -m data -s sig
T sign -c r.ctx -g sha256 -s rsapss -o sig data
T verifysignature -c r.ctx -g sha256 -m data -s sig
no sign -c r.ctx -g sha256 -s ecdsa -o sig data
no sign -c p.ctx -g sha256 -o sig data
T rsaencrypt -c r.ctx -o enc data
T rsadecrypt -c r.ctx -o dec enc
T rsaencrypt -c r.ctx -s oaep -o enc data
T rsadecrypt -c r.ctx -s oaep -o dec enc
no rsadecrypt -c r.ctx -s oaep -o dec digest
no rsadecrypt -c k.ctx -o dec enc
may rsaencrypt -c r.ctx -s null -o enc digest
key a -G aes128
T encryptdecrypt -c a.ctx -o enc data
T encryptdecrypt -d -c a.ctx -o dec enc
T encryptdecrypt -c a.ctx -G cbc -e -o enc data
T encryptdecrypt -c a.ctx -G ctr -o enc digest
no encryptdecrypt -c r.ctx -o enc data
key h -G hmac
T hmac -c h.ctx -g sha256 data
T hmac -c h.ctx big
no hmac -c a.ctx data
T hash -g sha256 data
T hash -C o -g sha384 -t ticket data
T hash -g sha1 big
T hash -C e -g sha512 big
no hash -g sm3_256 data
key d -G ecc -a "decrypt|fixedtpm|fixedparent|sensitivedataorigin|userwithauth"
T ecdhkeygen -c d.ctx -u eph.pub -o z
T ecdhzgen -c d.ctx -u eph.pub -o z2
may ecdhzgen -c k.ctx -u eph.pub -o z2
no ecdhkeygen -c r.ctx -u eph.pub -o z
T geteccparameters ecc256 -o par
T geteccparameters ecc521 -o par
may geteccparameters ecc192 -o par
T ecephemeral -u e.pub -t e.counter ecc256
key da -G ecc:ecdaa
may commit -c da.ctx -t cnt --eccpoint-P eph.pub -K K -L L -u E
key sn -G ecc:ecschnorr
T sign -c sn.ctx -g sha256 -s ecschnorr -o sig data
"""

NV = r"""
ALL="ownerwrite|ownerread|authread|authwrite|policyread|policywrite"
T nvdefine 0x1500001 -C o -s 32 -a "$ALL" -p nvauth
no nvdefine 0x1500001 -C o -s 32 -a "$ALL"
no nvread 0x1500001 -C o
T nvwrite 0x1500001 -C o -i digest
T nvwrite 0x1500001 -C 0x1500001 -P nvauth -i data --offset 4
T nvread 0x1500001 -C o
no nvread 0x1500001 -C 0x1500001 -P wrong
T nvread 0x1500001 -C 0x1500001 -P nvauth -s 8 --offset 3
no nvread 0x1500001 -C o -s 8 --offset 30
no nvwrite 0x1500001 -C o -i digest --offset 1
no nvwrite 0x1500001 -C p -i digest
T nvreadpublic 0x1500001
no nvreadpublic 0x1500099
no nvincrement 0x1500001 -C o
no nvreadlock 0x1500001 -C o
no nvwritelock 0x1500001 -C o
T nvdefine 0x1500002 -C o -a "ownerwrite|ownerread|authread|authwrite|nt=counter"
no nvread 0x1500002 -C o
T nvincrement 0x1500002 -C o
T nvincrement 0x1500002 -C 0x1500002
T nvread 0x1500002 -C o
no nvwrite 0x1500002 -C o -i digest
T nvdefine 0x1500003 -C o -a "ownerwrite|ownerread|nt=bits"
T nvsetbits 0x1500003 -C o -i 0x0f00
T nvsetbits 0x1500003 -C o -i 0x1
T nvread 0x1500003 -C o
T nvdefine 0x1500004 -C o -g sha256 -a "ownerwrite|ownerread|nt=extend"
T nvextend 0x1500004 -C o -i data
T nvextend 0x1500004 -C o -i data
T nvread 0x1500004 -C o
no nvsetbits 0x1500004 -C o -i 1
T nvdefine 0x1500005 -C o -s 8 -a "ownerwrite|ownerread|writedefine|read_stclear|write_stclear"
no nvwritelock 0x1500005 -C p
printf 12345678 | T nvwrite 0x1500005 -C o -i -
T nvwritelock 0x1500005 -C o
printf 12345678 > eight
no nvwrite 0x1500005 -C o -i eight
T nvread 0x1500005 -C o
T nvreadlock 0x1500005 -C o
no nvread 0x1500005 -C o
T nvdefine 0x1500006 -C p -s 8 -a "ppwrite|ppread|platformcreate|globallock"
no nvdefine 0x1500007 -C o -s 8 -a "ppwrite|ppread|platformcreate"
no nvdefine 0x1500007 -C o -s 8 -a "authread"
no nvdefine 0x1500007 -C o -s 3000 -a "$ALL"
no nvdefine 0x1500007 -C o -s 5 -a "ownerwrite|ownerread|nt=counter"
no nvundefine 0x1500006 -C o
T nvundefine 0x1500006 -C p
T nvdefine 0x1500008 -C o -s 2000 -a "ownerwrite|ownerread|no_da"
head -c 2000 /dev/zero > large
T nvwrite 0x1500008 -C o -i large
T nvread 0x1500008 -C o
primary
key k -G ecc
T nvcertify -C k.ctx -g sha256 -o sig --attestation att -c o --size 32 0x1500001
T nvundefine 0x1500001 -C o
T nvundefine 0x1500002 -C o
T nvundefine 0x1500008 -C o
no nvundefine 0x1500001 -C o
T getcap handles-nv-index
"""

POLICY = r"""
trial() {
    S startauthsession -S t; S "$@" -S t -L t.policy; S flushcontext t
    tpm2 flushcontext -Q -t
}
real() { S startauthsession --policy-session -S s; }
done_() { S flushcontext s; }
opens() { S unseal -c $1.ctx -p session:s$2; tpm2 flushcontext -Q -t; done_; }
stays() { no unseal -c $1.ctx -p session:s$2; done_; }
primary
sealed() { key $1 -i data -L $2 ${3:+-p $3}; }
trial policypcr -l sha256:0,16
sealed a t.policy
real; S policypcr -S s -l sha256:0,16; opens a
real; S policypcr -S s -l sha256:1; stays a
real; S policypcr -S s -l sha256:0,16; S pcrextend 1:sha256=$(printf 1%.0s {1..64})
stays a
trial policyauthvalue
sealed b t.policy bauth
real; S policyauthvalue -S s; opens b +bauth
real; S policyauthvalue -S s; stays b +wrong
trial policypassword
sealed c t.policy cauth
real; S policypassword -S s; opens c +cauth
real; S policypassword -S s; stays c +wrong
trial policycommandcode TPM2_CC_Unseal
sealed d t.policy
real; S policycommandcode -S s TPM2_CC_Unseal; opens d
real; S policycommandcode -S s TPM2_CC_Sign; stays d
trial policysecret -c o
sealed e t.policy
real; S policysecret -S s -c o; opens e
real; no policysecret -S s -c o wrong; done_
trial policylocality zero
sealed f t.policy
real; S policylocality -S s zero; opens f
real; S policylocality -S s three; stays f
openssl ecparam -name prime256v1 -genkey -noout -out signer.pem
openssl ec -in signer.pem -pubout -out signer.pub.pem 2>/dev/null
T loadexternal -C o -G ecc -u signer.pub.pem -c signer.ctx -n signer.name
trial policyauthorize -n signer.name
sealed g t.policy
S startauthsession -S t; S policypcr -S t -l sha256:1 -L pcr.policy; S flushcontext t
openssl dgst -sha256 -sign signer.pem -out pcr.sig pcr.policy
T verifysignature -c signer.ctx -g sha256 -m pcr.policy -s pcr.sig -t pcr.tkt -f ecdsa
real; S policypcr -S s -l sha256:1
S policyauthorize -S s -i pcr.policy -n signer.name -t pcr.tkt
opens g
real; S policypcr -S s -l sha256:2
no policyauthorize -S s -i pcr.policy -n signer.name -t pcr.tkt; done_
S startauthsession -S t; S policypcr -S t -l sha256:3 -L one.policy; S flushcontext t
S startauthsession -S t; S policypcr -S t -l sha256:4 -L two.policy; S flushcontext t
trial policyor sha256:one.policy,two.policy
sealed h t.policy
real; S policypcr -S s -l sha256:4; S policyor -S s sha256:one.policy,two.policy
opens h
real; no policyor -S s sha256:one.policy,two.policy; done_
trial policynvwritten s
T nvdefine 0x1500010 -C o -s 8 -a "ownerwrite|ownerread|authread|policywrite" -L t.policy
printf 12345678 > eight
real; S policynvwritten -S s s; no nvwrite 0x1500010 -C 0x1500010 -P session:s -i eight; done_
T nvwrite 0x1500010 -C o -i eight
real; S policynvwritten -S s s; S nvwrite 0x1500010 -C 0x1500010 -P session:s -i eight; done_
S startauthsession -S t; S policynv -S t -i eight 0x1500010 eq -C o -L t.policy
may policynv -S t -i eight 0x1500010 neq -C o; S flushcontext t
real; S policynv -S s -i eight 0x1500010 eq -C o
no policynv -S s -i eight 0x1500010 ult -C o; done_
S startauthsession -S t; S policyrestart -S t
S policyduplicationselect -S t -n signer.name -N signer.name
S flushcontext t
S startauthsession -S t; S policynamehash -S t -n digest; S flushcontext t
S startauthsession -S t; may policycphash -S t --cphash cphash; S flushcontext t
S startauthsession -S t; S policytemplate -S t --template-hash digest; S flushcontext t
trial policycountertimer --ult clock=99999999999999999
real; S policycountertimer -S s --ult clock=99999999999999999
no policycountertimer -S s --ult clock=1; done_
real; S policysigned -S s --raw-data to.sign -c signer.ctx -q ff
openssl dgst -sha256 -sign signer.pem -out signed.sig to.sign
S policysigned -S s -g sha256 -s signed.sig -f ecdsa -c signer.ctx -q ff
no policysigned -S s -g sha256 -s signed.sig -f ecdsa -c signer.ctx -q aa
done_
S startauthsession --policy-session -S s
S policysecret -S s -c o --expiration -2147483647 --ticket k.tkt --timeout k.time -x -L tk.policy
done_
S readpublic -c p.ctx -n p.name; tpm2 flushcontext -Q -t
real; S getpolicydigest -S s -o now; done_
no policypcr -S s -l sha256:1
"""

PCR = r"""
T pcrread
T pcrread sha256:0,1,2+sha384:16,23
may pcrread sha512:0
T pcrextend 16:sha256=$(printf 1%.0s {1..64})
T pcrextend 16:sha1=$(printf 2%.0s {1..40}),sha256=$(printf 3%.0s {1..64})
T pcrextend 0:sha256=$(printf 4%.0s {1..64})
no pcrextend 17:sha256=$(printf 4%.0s {1..64})
T pcrevent 16 data
T pcrevent data
T pcrreset 16
T pcrreset 23
no pcrreset 0
no pcrreset 17
T pcrread sha256:16+sha1:16
T pcrallocate sha256:all+sha1:none
no pcrallocate -P wrong sha256:all
T getcap pcrs
"""

HIERARCHY = r"""
T changeauth -c o ownerauth
no createprimary -C o -G ecc -c no.ctx
T createprimary -C o -P ownerauth -G ecc -c p.ctx
T changeauth -c o -p ownerauth
no changeauth -c o -p ownerauth other
T changeauth -c e endorseauth
T changeauth -c e -p endorseauth
T changeauth -c l lockauth
T clear -c l lockauth
T setprimarypolicy -C o -L digest -g sha256
T setprimarypolicy -C o
no setprimarypolicy -C o -P wrong -L digest -g sha256
T clearcontrol -C l s
no clear -c l
no clearcontrol -C l c
T clearcontrol -C p c
T clear -c p
may hierarchycontrol -C p phEnable set
T hierarchycontrol -C p ehEnable clear
no createprimary -C e -G ecc -c no.ctx
T hierarchycontrol -C p ehEnable set
T createprimary -C e -G ecc -c no.ctx
T hierarchycontrol -C o shEnable clear
no createprimary -C o -G ecc -c no.ctx
T hierarchycontrol -C p shEnable set
T changeeps
T createprimary -C e -G ecc -c e.ctx
T changepps
T createprimary -C p -G ecc -c pp.ctx
T setclock 99999999999999
no setclock 1
T clockrateadjust s
may clockrateadjust -p "" f
no clockrateadjust -c o -p wrong f
T changeauth -c l lockauth
no clear -c l wrong
no clear -c l lockauth
T hierarchycontrol -C p phEnable clear
no createprimary -C p -G ecc -c no.ctx
"""

LOCKOUT = r"""
T dictionarylockout -s -n 3 -t 100000 -l 100000
primary
key s -i data -p sealauth
no unseal -c s.ctx -p one
no unseal -c s.ctx -p two
T unseal -c s.ctx -p sealauth
no unseal -c s.ctx -p three
no unseal -c s.ctx -p sealauth
T getcap properties-variable
T dictionarylockout -c
T unseal -c s.ctx -p sealauth
key n -i data -p sealauth -a "fixedtpm|fixedparent|noda|userwithauth"
no unseal -c n.ctx -p wrong
T unseal -c n.ctx -p sealauth
T nvdefine 0x1500001 -C o -s 8 -a "ownerwrite|authread|authwrite" -p nvauth
no nvread 0x1500001 -C 0x1500001 -P wrong
T dictionarylockout -s -n 5 -t 1000 -l 0
T changeauth -c l lockauth
no dictionarylockout -c -p wrong
no dictionarylockout -c -p lockauth
T getcap properties-variable
"""

ATTEST = r"""
AK="fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"
primary
key k -G ecc:ecdsa:null -a "$AK"
T quote -c k.ctx -l sha256:0,16 -q 00112233 -m m -s s
key r -G rsa2048:rsassa:null -a "$AK"
T quote -c r.ctx -l sha256:0+sha1:1 -q 00112233 -m m -s s
no quote -c p.ctx -l sha256:0 -m m -s s
key h -G hmac
T certify -c k.ctx -C r.ctx -g sha256 -o att -s sig
T certify -c r.ctx -C k.ctx -g sha256 -o att -s sig
T createprimary -C o -G ecc -c q.ctx -d q.digest -t q.ticket
T certifycreation -C k.ctx -c q.ctx -d q.digest -t q.ticket -g sha256 -o sig --attestation att
no certifycreation -C k.ctx -c p.ctx -d digest -t q.ticket -g sha256 -o sig --attestation att
T gettime -c k.ctx -o sig --attestation att
T gettime -c r.ctx -o sig --attestation att
T setcommandauditstatus TPM2_CC_Hash
T hash data
T getcommandauditdigest -c k.ctx -s sig -m att
T setcommandauditstatus -c TPM2_CC_Hash
T readclock
S startauthsession --audit-session -S a
S getrandom 4 -S a
S hash data
S getsessionauditdigest -c k.ctx -S a -m att -s sig -g sha256
S flushcontext a
tpm2 flushcontext -Q -t
no sign -c k.ctx -g sha256 -d digest -o sig
T hash -C o -g sha256 -t tk -o hh data
may sign -c k.ctx -g sha256 -d hh -t tk -o sig
"""

CREDENTIAL = r"""
primary
T createek -c ek.ctx -G ecc -u ek.pub
key ak -G ecc
T readpublic -c ak.ctx -n ak.name
may makecredential -e ek.pub -s data -n $(xxd -p -c 100 ak.name) -o cred
may makecredential -u ek.pub -s data -n $(xxd -p -c 100 ak.name) -o cred
S startauthsession --policy-session -S s
S policysecret -S s -c e
S activatecredential -c ak.ctx -C ek.ctx -i cred -o out -P session:s
tpm2 flushcontext -Q -t
S flushcontext s
S startauthsession --policy-session -S s
no activatecredential -c ak.ctx -C ek.ctx -i cred -o out -P session:s
S flushcontext s
S startauthsession -S t; S policycommandcode -S t -L dup.policy TPM2_CC_Duplicate; S flushcontext t
key d -G ecc -L dup.policy -a "sensitivedataorigin|userwithauth|decrypt|sign"
T createprimary -C e -G ecc -c new.ctx
S startauthsession --policy-session -S s; S policycommandcode -S s TPM2_CC_Duplicate
S duplicate -C new.ctx -c d.ctx -G null -p session:s -r dup.priv -s dup.seed
tpm2 flushcontext -Q -t
S flushcontext s
T import -C new.ctx -u d.pub -i dup.priv -r imp.priv -s dup.seed
T load -C new.ctx -u d.pub -r imp.priv -c imp.ctx
no import -C p.ctx -u d.pub -i dup.priv -r no.priv -s dup.seed
S startauthsession --policy-session -S s; S policycommandcode -S s TPM2_CC_Duplicate
head -c 16 /dev/urandom > key
S duplicate -C new.ctx -c d.ctx -G aes -i key -p session:s -r dup.priv -s dup.seed
tpm2 flushcontext -Q -t
S flushcontext s
no duplicate -C new.ctx -c d.ctx -G null -r dup.priv -s dup.seed
openssl ecparam -name prime256v1 -genkey -noout -out out.pem
T import -C p.ctx -G ecc -i out.pem -u o.pub -r o.priv
T load -C p.ctx -u o.pub -r o.priv -c o.ctx
"""

MANAGEMENT = r"""
for c in algorithms commands properties-fixed properties-variable ecc-curves handles-transient \
    handles-persistent handles-permanent handles-pcr handles-nv-index handles-loaded-session \
    handles-saved-session pcrs; do T getcap $c; done
T getrandom 8
T getrandom 48
T selftest
T selftest -f
T incrementalselftest sha256 rsa ecc
T gettestresult
may startup -c
T readclock
T shutdown
T getrandom 4
T shutdown -c
T startup
T getrandom 4
T stirrandom data
T getrandom 8
T send < <(printf '\x80\x01\x00\x00\x00\x0c\x00\x00\x01\x7b\x00\x08')
"""

SESSIONS = r"""
primary
key s -i data -p sealauth
S startauthsession --hmac-session -S h
S unseal -c s.ctx -p session:h+sealauth; tpm2 flushcontext -Q -t
S unseal -c s.ctx -p session:h+sealauth; tpm2 flushcontext -Q -t
no unseal -c s.ctx -p session:h+wrong
S sessionconfig --enable-encrypt h
S unseal -c s.ctx -p session:h+sealauth; tpm2 flushcontext -Q -t
S flushcontext h
S startauthsession --hmac-session -c p.ctx -S b
S unseal -c s.ctx -p session:b+sealauth; tpm2 flushcontext -Q -t
S sessionconfig --enable-encrypt --enable-decrypt b
S create -C p.ctx -i data -p other -P session:b -u o.pub -r o.priv; tpm2 flushcontext -Q -t
S getrandom 16 -S b
S flushcontext b
S startauthsession --policy-session -S 1
S startauthsession --policy-session -S 2
S startauthsession --policy-session -S 3
S startauthsession --policy-session -S 4
S policycommandcode -S 1 TPM2_CC_Sign
S policycommandcode -S 4 TPM2_CC_Sign
S policyrestart -S 2
T getcap handles-saved-session
may flushcontext 1
S flushcontext -s
S flushcontext -s
"""

SCRIPTS = {
    "tools-keys": KEYS,
    "tools-crypt": CRYPT,
    "tools-nv": NV,
    "tools-policy": POLICY,
    "tools-pcr": PCR,
    "tools-hierarchy": HIERARCHY,
    "tools-lockout": LOCKOUT,
    "tools-attest": ATTEST,
    "tools-credential": CREDENTIAL,
    "tools-management": MANAGEMENT,
    "tools-sessions": SESSIONS,
}
