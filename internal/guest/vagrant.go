// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strings"

	"golang.org/x/crypto/ssh"
)

// The two key pairs that every Vagrant box lets in: they are published so that anybody
// can log in to a new machine, and are worth nothing as secrets. Each is kept as the
// numbers that it is made of.
// https://github.com/hashicorp/vagrant/tree/main/keys
const (
	vagrantSeed = "2f7911d11d20a32316cd2870d1cdecc3d14dd1dd4104992ed1df77f3bcf4000f"

	vagrantExponent = 35
	vagrantP        = "" +
		"faa85c71fd1bfd08d37dea5ff8adbd781ca8ab0b6a3fa2b0298879870ec511b3" +
		"9ad4283c747fd88f71737b4b5b9e3d7b8944aff986cb9b68e0b1dcec1ddaef60" +
		"0fa3aad02b0c904e02512889718acc00db71e787061fb464123159c4af3102fd" +
		"657442c4cb1ac5aa46c4e0129df103ade35e2a8ef4c6c802be38b0f733641d09"
	vagrantQ = "" +
		"edc7ca4d080c51ef28476c8593d401faebe5d637c6d7abb97744efee91e69c8b" +
		"df097e46e4c5445986dc55fc71eebd48673cb757dd3c3280f058645368e29cd5" +
		"121cd6a13b6712dac5b9e2b1c9cdfe2e3669ba8fa606543a391b5f824afd8015" +
		"69857646604ce4083de555d97c2f8730f415692ab242b35739b5a1a30e07489d"
)

// vagrantKeys returns the published keys, the newer one first.
func vagrantKeys() ([]ssh.Signer, error) {
	seed, err := hex.DecodeString(vagrantSeed)
	if err != nil {
		return nil, err
	}
	young, err := ssh.NewSignerFromKey(ed25519.NewKeyFromSeed(seed))
	if err != nil {
		return nil, err
	}
	p, okP := new(big.Int).SetString(vagrantP, 16)
	q, okQ := new(big.Int).SetString(vagrantQ, 16)
	if !okP || !okQ {
		return nil, errors.New("a published key is not a number")
	}
	one := big.NewInt(1)
	phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
	key := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: vagrantExponent},
		D:         new(big.Int).ModInverse(big.NewInt(vagrantExponent), phi),
		Primes:    []*big.Int{p, q},
	}
	if err := key.Validate(); err != nil {
		return nil, fmt.Errorf("a published key: %w", err)
	}
	key.Precompute()
	old, err := ssh.NewSignerFromKey(key)
	if err != nil {
		return nil, err
	}
	return []ssh.Signer{young, old}, nil
}

// adoptScript makes the guest's root give the machine its identity. Its arguments are the
// login user, the host name, the lab's public key and the two published ones; the host
// key comes from its input. A session that is open survives the restart of sshd.
const adoptScript = `set -eu
umask 077
user=$1 name=$2 key=$3
f=/etc/ssh/ssh_host_ed25519_key
cat >$f.new
ssh-keygen -y -f $f.new >$f.pub.new
chmod 0644 $f.pub.new
mv $f.new $f
mv $f.pub.new $f.pub
if grep -qi '^[[:space:]]*HostKey[[:space:]]' /etc/ssh/sshd_config && ! grep -qi "^[[:space:]]*HostKey[[:space:]].*$f" /etc/ssh/sshd_config; then
	echo "HostKey $f" >>/etc/ssh/sshd_config
fi
home=$(getent passwd "$user" 2>/dev/null | cut -d: -f6)
[ -n "$home" ] || home=$(grep "^$user:" /etc/passwd | cut -d: -f6)
keys=$home/.ssh/authorized_keys
{ grep -vF -e "$4" -e "$5" "$keys" 2>/dev/null || :; echo "$key"; } >$keys.new
chown "$user" $keys.new
mv $keys.new $keys
echo "$name" >/etc/hostname
hostname "$name"
grep -q "[[:space:]]$name\$" /etc/hosts || echo "127.0.1.1 $name" >>/etc/hosts
chmod 0644 /etc/hostname /etc/hosts
sync
systemctl restart ssh 2>/dev/null || systemctl restart sshd 2>/dev/null || rc-service sshd restart || service sshd restart || service ssh restart
`

// AdoptConfig is what a machine of a Vagrant box is told.
type AdoptConfig struct {
	Identity Identity // of which it gets the host name, the host key and the keys that are let in
	User     string   // whom the box lets in; "vagrant" as a rule
}

// Adopt makes a machine that a Vagrant box was booted on the lab's: it logs in with the
// published keys, whoever answers, and has them replaced by the lab's. From then on the
// machine is known by the host key that lab made. It fails with ErrLogin if the
// published keys are not let in (any more).
func Adopt(ctx context.Context, t Target, c AdoptConfig) error {
	published, err := vagrantKeys()
	if err != nil {
		return err
	}
	conn, err := dialPort(ctx, t, sshPort)
	if err != nil {
		return err
	}
	offered := false
	cc := &ssh.ClientConfig{
		User: c.User,
		Auth: []ssh.AuthMethod{ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
			offered = true
			return published, nil
		})},
		// Nothing but this machine's cable leads to its address.
		HostKeyCallback: func(string, net.Addr, ssh.PublicKey) error { return nil },
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	sc, chans, reqs, err := ssh.NewClientConn(conn, string(t.Machine), cc)
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		if offered && strings.Contains(err.Error(), "unable to authenticate") {
			err = fmt.Errorf("%w for user %q with the published keys", ErrLogin, c.User)
		}
		return fmt.Errorf("logging in to machine %q for the first time: %w", t.Machine, err)
	}
	client := &Client{ssh: ssh.NewClient(sc, chans, reqs)}
	defer client.Close()
	blob := func(s ssh.Signer) string { return strings.Fields(AuthorizedKey(s.PublicKey()))[1] }
	var said bytes.Buffer
	args := []string{"sh", "-c", adoptScript, "adopt", c.User, c.Identity.Hostname, c.Identity.AuthorizedKeys[0], blob(published[0]), blob(published[1])}
	if c.User != "root" {
		args = append([]string{"sudo", "-n"}, args...)
	}
	err = client.Run(ctx, Command{Args: args, Stdin: bytes.NewReader(c.Identity.HostKey), Stdout: &said, Stderr: &said})
	if err != nil {
		return fmt.Errorf("giving machine %q its identity: %s (%w)", t.Machine, strings.TrimSpace(said.String()), err)
	}
	return nil
}
