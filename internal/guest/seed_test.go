// SPDX-License-Identifier: Apache-2.0

package guest_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/fat12"
	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/guest"
	"github.com/labfile/lab/internal/lab"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestSeed(t *testing.T) {
	pem, err := os.ReadFile("testdata/host_key")
	if err != nil {
		t.Fatal(err)
	}
	key, err := guest.ParseKey(pem)
	if err != nil {
		t.Fatal(err)
	}
	network := lab.NetworkOf("shop-1f3a9c2b")
	id, err := guest.NewIdentity(guest.IdentityConfig{
		Machine: "web-1", Address: network.Host(11), Network: network, AuthorizedKey: key.Signer.PublicKey(), HostKey: key,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		seed guest.SeedConfig
	}{
		{"plain", guest.SeedConfig{User: "debian"}},
		{"root", guest.SeedConfig{User: "root"}},
		{"merged", guest.SeedConfig{UserData: `#cloud-config
# a comment
hostname: mine
packages: [htop]
users:
  - name: alice
    groups: sudo
    inactive: yes
write_files:
  - {path: /x, permissions: 0644, content: "a\nb"}
ssh_authorized_keys: [ssh-ed25519 AAAA alice]
`}},
		{"agent", guest.SeedConfig{AgentRuns: true, UserData: "#cloud-config\nruncmd:\n- [touch, /done]\nssh_deletekeys: true\n"}},
		{"script", guest.SeedConfig{AgentRuns: true, UserData: "#!/bin/sh\necho hello >/hello\n"}},
		{"mime", guest.SeedConfig{User: "lab", UserData: "Content-Type: multipart/mixed; boundary=\"x\"\nMIME-Version: 1.0\n\n--x\nContent-Type: text/x-shellscript\n\n#!/bin/sh\n--x--\n"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.seed.Identity, tc.seed.InstanceID = id, "shop-1f3a9c2b-web-1-3"
			vol, err := guest.Seed(tc.seed)
			if err != nil {
				t.Fatal(err)
			}
			again, err := guest.Seed(tc.seed)
			if err != nil || !bytes.Equal(vol, again) {
				t.Errorf("the same seed twice differs, or %v", err)
			}
			got := readSeed(t, vol)
			golden := filepath.Join("testdata/seed", tc.name+".golden")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), string(got)); d != "" {
				t.Errorf("seed differs (- golden, + now):\n%s", d)
			}
		})
	}
}

// readSeed shows the files of a volume, and its label.
func readSeed(t *testing.T, vol []byte) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(path, vol, 0o600); err != nil {
		t.Fatal(err)
	}
	disk, err := file.OpenFromPath(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	fs, err := fat12.Read(disk, int64(len(vol)), 0, 512)
	if err != nil {
		t.Fatal(err)
	}
	out := bytes.NewBufferString("label: " + fs.Label() + "\n")
	entries, err := fs.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		f, err := fs.OpenFile("/"+e.Name(), os.O_RDONLY)
		if err != nil {
			t.Fatal(err)
		}
		var text bytes.Buffer
		if _, err := text.ReadFrom(f); err != nil {
			t.Fatal(err)
		}
		out.WriteString("--- " + e.Name() + " " + fi.ModTime().UTC().Format("2006-01-02") + "\n")
		out.Write(text.Bytes())
	}
	return out.Bytes()
}

func TestSeedErrors(t *testing.T) {
	key := newKey(t)
	for _, tc := range []struct{ data, want string }{
		{"hello", "user data for cloud-init: line 1: cloud-init does not know what this is; begin with #cloud-config or, for a script, with #!/bin/sh"},
		{"\n#!/bin/sh\n", "user data for cloud-init: line 1: cloud-init wants its first line at the very beginning; leave out the space before it"},
		{"#cloud-config\na: [", "user data for cloud-init: line 2: did not find expected node content"},
		{"#cloud-config\n- a\n", "user data for cloud-init: line 2: a cloud configuration is a mapping of keys, such as packages: [nginx]"},
		{string(make([]byte, guest.MaxUserData+1)), "user data for cloud-init: line 1: 1048577 bytes; at most 1048576 are possible"},
	} {
		_, err := guest.Seed(guest.SeedConfig{Identity: guest.Identity{HostKey: key.PEM}, UserData: tc.data})
		if err == nil || err.Error() != tc.want {
			t.Errorf("%.20q: got %v, want %s", tc.data, err, tc.want)
		}
	}
	if _, err := guest.Seed(guest.SeedConfig{AgentRuns: true, UserData: "#!" + string(bytes.Repeat([]byte("x"), guest.MaxUserData-2))}); err != nil {
		t.Errorf("the largest user data: %v", err)
	}
}
