// SPDX-License-Identifier: Apache-2.0

package build

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestArgv(t *testing.T) {
	for _, tc := range []struct {
		name string
		run  debootstrap
		want []string
	}{
		{
			"installed",
			debootstrap{
				Mode: "unshare", Suite: "bookworm", Variant: "minbase", Packages: []string{"sudo", "curl", "sudo"},
				Exclude: []string{"/usr/share/doc/*"}, Include: []string{"/usr/share/doc/*/copyright"},
				Customize: []string{`chroot "$1" true`},
			},
			[]string{
				"--mode=unshare", "--variant=minbase", "--format=tar", "--verbose", "--include=curl,sudo",
				"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
				`--customize-hook=chroot "$1" true`, "bookworm", "-",
			},
		},
		{
			"unpacked, from a mirror",
			debootstrap{Mode: "root", Suite: "bookworm", Variant: "extract", Packages: []string{"busybox-static"}, Mirror: "https://mirror.example/"},
			[]string{
				"--mode=root", "--variant=extract", "--format=tar", "--verbose", "--include=busybox-static",
				`--extract-hook=for deb in "$1"/var/cache/apt/archives/*.deb; do dpkg-deb --show --showformat='${Package}=${Version}\n' "$deb" || exit 1; done >"$1/.lab-packages"`,
				"bookworm", "-",
				"deb https://mirror.example/debian bookworm main",
				"deb https://mirror.example/debian bookworm-updates main",
				"deb https://mirror.example/debian-security bookworm-security main",
			},
		},
		{
			"a mirror in apt's words",
			debootstrap{Mode: "root", Suite: "bookworm", Variant: "minbase", Packages: []string{"sudo"}, Mirror: "deb [trusted=yes] file:/srv bookworm main"},
			[]string{
				"--mode=root", "--variant=minbase", "--format=tar", "--verbose", "--include=sudo",
				"bookworm", "-", "deb [trusted=yes] file:/srv bookworm main",
			},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if d := cmp.Diff(tc.want, tc.run.argv()); d != "" {
				t.Errorf("argv (-want +got):\n%s", d)
			}
		})
	}
}

func TestMirrorMayEndInDebian(t *testing.T) {
	if got, want := mirrors("http://m.example/debian/", "bookworm")[2], "deb http://m.example/debian-security bookworm-security main"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCounter(t *testing.T) {
	var c counter
	var moved int
	for _, line := range []string{
		"0 upgraded, 69 newly installed, 0 to remove and 0 not upgraded.",
		"Unpacking dash (0.5.12) ...",
		"Preparing to unpack .../dash.deb ...",
		"Setting up dash (0.5.12) ...",
		"0 upgraded, 100 newly installed, 0 to remove and 0 not upgraded.",
		"Unpacking sudo (1.9) ...",
	} {
		if c.line(line) {
			moved++
		}
	}
	if want := (counter{done: 3, total: 338}); c != want || moved != 3 {
		t.Errorf("got %+v, moved %d times; want %+v, 3", c, moved, want)
	}
}

func TestFollowKeepsTrouble(t *testing.T) {
	var log []string
	in := "I: running apt-get update...\n10% [Working]\r20% [Working]\r\nE: Unable to locate package x\n" + strings.Repeat("I: on\n", 30)
	got := follow(strings.NewReader(in), func(l string) { log = append(log, l) })
	if d := cmp.Diff([]string{"E: Unable to locate package x"}, got); d != "" {
		t.Errorf("kept (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"I: running apt-get update...", "10% [Working]", "20% [Working]"}, log[:3]); d != "" {
		t.Errorf("logged (-want +got):\n%s", d)
	}
	if got := follow(strings.NewReader(strings.Repeat("I: on\n", 30)), func(string) {}); len(got) != 12 {
		t.Errorf("without trouble %d lines are kept, want 12", len(got))
	}
}
