// SPDX-License-Identifier: Apache-2.0

package build

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/boxes/recipes"
)

func testKernel(t *testing.T) *kernel {
	t.Helper()
	tr := newTree(t.TempDir())
	for p, content := range map[string]string{
		"boot/vmlinuz-6.1.0": "kernel",
		"usr/bin/busybox":    "busybox",
		"usr/lib/modules/6.1.0/modules.dep": "kernel/virtio-net.ko: kernel/failover.ko kernel/virtio.ko\n" +
			"kernel/failover.ko:\nkernel/virtio.ko:\nkernel/ext4.ko:\n",
		"usr/lib/modules/6.1.0/kernel/virtio-net.ko": "net",
		"usr/lib/modules/6.1.0/kernel/failover.ko":   "failover",
		"usr/lib/modules/6.1.0/kernel/virtio.ko":     "virtio",
		"usr/lib/modules/6.1.0/kernel/ext4.ko":       "ext4",
	} {
		if err := tr.file(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	k, err := readKernel(tr)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestModules(t *testing.T) {
	k := testKernel(t)
	into := newTree(t.TempDir())
	if err := k.install(into, []string{"virtio_net"}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range into.sorted() {
		if n.Spool != "" {
			got = append(got, strings.TrimPrefix(n.Path, "usr/lib/modules/6.1.0/"))
		}
	}
	if d := cmp.Diff([]string{"kernel/failover.ko", "kernel/virtio-net.ko", "kernel/virtio.ko", "modules.dep"}, got); d != "" {
		t.Errorf("files (-want +got):\n%s", d)
	}
	dep, err := into.content("usr/lib/modules/6.1.0/modules.dep")
	if want := "kernel/failover.ko:\nkernel/virtio-net.ko: kernel/failover.ko kernel/virtio.ko\nkernel/virtio.ko:\n"; err != nil || string(dep) != want {
		t.Errorf("modules.dep is %q (%v), want %q", dep, err, want)
	}
	if err := k.install(into, []string{"nosuch"}); err == nil || err.Error() != "kernel 6.1.0 has no module nosuch" {
		t.Errorf("got %v", err)
	}
}

func TestInitrd(t *testing.T) {
	k := testKernel(t)
	boot := recipes.Boot{Modules: []string{"virtio-net"}, Init: []byte("#!/bin/busybox sh\n")}
	a, err := k.initrd(boot)
	if err != nil {
		t.Fatal(err)
	}
	b, err := k.initrd(boot)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("two initrds of the same kernel differ")
	}
	want := []string{
		"bin 40755", "dev 40755", "root 40755", "lib 40755", "lib/modules 40755", "lib/modules/6.1.0 40755",
		"dev/console 20600", "init 100755 #!/bin/busybox sh\n", "bin/busybox 100755 busybox",
		"modules 100644 virtio-net\n",
		"lib/modules/6.1.0/modules.dep 100644 kernel/failover.ko:\nkernel/virtio-net.ko: kernel/failover.ko kernel/virtio.ko\nkernel/virtio.ko:\n",
		"lib/modules/6.1.0/kernel 40755",
		"lib/modules/6.1.0/kernel/failover.ko 100644 failover",
		"lib/modules/6.1.0/kernel/virtio-net.ko 100644 net",
		"lib/modules/6.1.0/kernel/virtio.ko 100644 virtio",
	}
	if d := cmp.Diff(want, uncpio(t, a)); d != "" {
		t.Errorf("initrd (-want +got):\n%s", d)
	}
}
