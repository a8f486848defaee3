// SPDX-License-Identifier: Apache-2.0

package qemu

import (
	"context"
	"testing"
	"time"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/local"
	"github.com/labfile/lab/providers/qmp"
)

func TestCheck(t *testing.T) {
	found, err := New(Config{Dirs: testDirs(t), Accel: "tcg"}).Check(testContext(t))
	must(t, err)
	levels := map[string]providers.Level{}
	for _, f := range found {
		t.Logf("%s: %s: %s (%s)", f.Topic, f.Level, f.Detail, f.Cure)
		levels[f.Topic] = f.Level
		if f.Level != providers.LevelOK && f.Cure == "" {
			t.Errorf("%s has no cure", f.Topic)
		}
	}
	for _, topic := range []string{"qemu", "sandbox", "qemu-img", "kernel", "runtime directory"} {
		if levels[topic] != providers.LevelOK {
			t.Errorf("%s: %q", topic, levels[topic])
		}
	}
	for _, topic := range []string{"acceleration", "disk space", "limits"} {
		if levels[topic] == "" {
			t.Errorf("%s was not looked at", topic)
		}
	}
}

func TestCheckWithoutQEMU(t *testing.T) {
	found, err := New(Config{Dirs: testDirs(t), Binary: "qemu-none", ImgBinary: "qemu-img-none"}).Check(testContext(t))
	must(t, err)
	want := map[string]providers.Finding{
		"qemu":     {Topic: "qemu", Level: providers.LevelError, Detail: "qemu-none not found", Cure: installCure()},
		"qemu-img": {Topic: "qemu-img", Level: providers.LevelWarning, Detail: "qemu-img-none not found; it is needed to build boxes", Cure: installCure()},
	}
	for _, f := range found {
		if w, ok := want[f.Topic]; ok && f != w {
			t.Errorf("got %+v\nwant %+v", f, w)
		}
		delete(want, f.Topic)
	}
	if len(want) > 0 {
		t.Errorf("missing: %v", want)
	}
}

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]qmp.Version{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright": {Major: 7, Minor: 2, Micro: 22, Package: "Debian 1:7.2+dfsg-7+deb12u18+b3"},
		"QEMU emulator version 10.0.0\n":                                            {Major: 10},
		"qemu-img version 9.1.3 (qemu-9.1.3)\n":                                     {Major: 9, Minor: 1, Micro: 3, Package: "qemu-9.1.3"},
	} {
		if got, err := parseVersion([]byte(text)); err != nil || got != want {
			t.Errorf("%q: got %+v, %v", text, got, err)
		}
	}
	if _, err := parseVersion([]byte("busybox\nx")); err == nil || err.Error() != `no version in "busybox"` {
		t.Errorf("got %v", err)
	}
}

func TestInstallCommand(t *testing.T) {
	for text, want := range map[string]string{
		"ID=debian\nVERSION_ID=\"12\"\n":               "sudo apt install qemu-system-x86 qemu-utils",
		"NAME=Mint\nID=linuxmint\nID_LIKE='ubuntu'\n":  "sudo apt install qemu-system-x86 qemu-utils",
		"ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"": "sudo dnf install qemu-system-x86-core qemu-img",
		"ID=arch": "sudo pacman -S qemu-base",
		"ID=opensuse-leap\nID_LIKE=\"suse opensuse\"": "sudo zypper install qemu-x86 qemu-tools",
		"ID=alpine": "sudo apk add qemu-system-x86_64 qemu-img",
		"ID=plan9":  "install QEMU 7.2 or newer (qemu-system-x86_64 and qemu-img) with your package manager",
	} {
		if got := local.InstallCommand([]byte(text), packages); got != want {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
	}
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}
