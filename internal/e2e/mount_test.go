// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// mounted is a lab whose machines see folders of this host.
const mounted = `lab: mounted
machines:
  tiny:
    box: builtin/tiny
    replace: blue-green
    mounts:
      - ./src:/src
      - {from: ./out, to: /srv/out, writable: true, owner: nobody}
  debian:
    box: builtin/debian-12
    user: lab
    mounts:
      - ./src:/home/lab/src
      - {from: ./out, to: /srv/out, writable: true}
`

// TestMounts shares folders with two machines, which read, write, try to get out of
// them, and keep them through the ends of all that serves them.
func TestMounts(t *testing.T) {
	w := ordinary(t).debian(t)
	s := w.site(t, mounted)
	s.fails(3, []string{`machines.tiny.mounts[0]: there is no folder ` + filepath.Join(s.dir, "src")}, "plan")
	for _, dir := range []string{"src", "src/many", "out"} {
		if err := os.Mkdir(filepath.Join(s.dir, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := w.own(filepath.Join(s.dir, dir)); err != nil {
			t.Fatal(err)
		}
	}
	s.write("src/file", "one\n")
	s.write("src/script", "#!/bin/sh\necho run\n")
	s.write("secret", "of the host\n")
	if err := os.Chmod(filepath.Join(s.dir, "src", "script"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.ok("up")
	on := func(machine, script string) string {
		s.Helper()
		return s.ok("exec", machine, "--", script)
	}
	host := func(name string) string {
		s.Helper()
		b, err := os.ReadFile(filepath.Join(s.dir, name))
		if err != nil {
			s.Error(err)
		}
		return string(b)
	}
	src := map[string]string{"tiny": "/src", "debian": "/home/lab/src"}
	for m, dir := range src {
		s.write("src/file", "one\n")
		s.equal(m+" reads", on(m, "cat "+dir+"/file"), "one\n")
		s.write("src/file", "one, and then another\n")
		s.equal(m+" reads what changed", on(m, "cat "+dir+"/file"), "one, and then another\n")
		s.equal(m+" runs a program", on(m, dir+"/script"), "run\n")
		refused := on(m, "for c in 'echo x >file' 'echo x >new' 'rm file' 'mkdir d' 'mv file f' 'ln -s a b' 'chmod 0777 file' 'touch file'; do (cd "+dir+" && eval \"$c\") 2>&1 && echo \"$c was possible\"; done; true")
		if n := strings.Count(refused, "Read-only file system"); n != 8 || strings.Contains(refused, "possible") {
			s.Errorf("%s: what would write to a read-only mount:\n%s", m, refused)
		}
	}
	s.equal("owners", on("tiny", "stat -c %U:%G:%a /src/script /srv/out")+on("debian", "stat -c %U:%G:%a /home/lab/src/script /srv/out; id -un"),
		"root:root:755\nnobody:nogroup:755\nlab:lab:755\nlab:lab:755\nlab\n")

	// What a guest writes belongs to whoever runs lab.
	on("debian", "set -e; cd /srv/out; umask 027; echo first >a; echo second >>a; mkdir -p d/e; mv a d/e/b; ln d/e/b c; chmod 0600 c; "+
		"seq 100000 >big; truncate -s 10 big; touch -d @1700000000.123456789 big; ln -s e/b d/link; cat d/e/../link | tail -n1; cp -r d d2; rm -r d2; exec 3<c; rm c; cat <&3 >c2")
	st, err := os.Stat(filepath.Join(s.dir, "out", "d", "e", "b"))
	if err != nil {
		t.Fatal(err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); !ok || int(sys.Uid) != w.uid() || st.Mode() != 0o600 {
		s.Errorf("a file that the guest made: %v, %+v", st.Mode(), st.Sys())
	}
	s.equal("content", host("out/d/e/b")+host("out/c2")+host("out/big"), "first\nsecond\nfirst\nsecond\n1\n2\n3\n4\n5\n")
	if st, err := os.Stat(filepath.Join(s.dir, "out", "big")); err != nil || st.ModTime().UnixNano() != 1700000000123456789 {
		s.Errorf("times: %v, %v", st.ModTime(), err)
	}
	s.equal("the other machine sees it", on("tiny", "cat /srv/out/d/e/b"), "first\nsecond\n")

	// A link leads to the guest's own files, if anywhere.
	on("debian", "ln -s /etc/hostname /srv/out/host; ln -s ../secret /srv/out/up; ln -s "+filepath.Join(s.dir, "secret")+" /srv/out/away")
	s.equal("a link made by the guest", on("debian", "cat /srv/out/host; cat /srv/out/up /srv/out/away 2>/dev/null; readlink /srv/out/host"), "debian\n/etc/hostname\n")
	if got, err := os.Readlink(filepath.Join(s.dir, "out", "host")); err != nil || got != "/etc/hostname" {
		s.Errorf("on the host the link leads to %q, %v", got, err)
	}

	// A large file, and a folder with many, by several readers at once.
	large := strings.Repeat("0123456789abcdef", 1<<18)
	s.write("src/large", large)
	for i := range 500 {
		s.write(fmt.Sprintf("src/many/%d", i), "x")
	}
	s.equal("readers", on("tiny", "for i in 1 2 3; do wc -c </src/large & done; wait; cmp /src/large /src/large && cp /src/large /srv/out/copy; ls /src/many | wc -l; cat /src/many/* | wc -c"),
		strings.Repeat(fmt.Sprintln(len(large)), 3)+"500\n500\n")
	if host("out/copy") != large {
		s.Error("a large file was not copied as it is")
	}

	// The guest's kernel, which has asked for a folder's files, hears of changes at the host.
	for m, dir := range src {
		on(m, "ls -l "+dir+"/many >/dev/null; ls -l "+dir+"/many | wc -l")
		s.write("src/many/7", "7 is longer now\n")
		s.write("src/many/new-for-"+m, "new\n")
		if err := os.Remove(filepath.Join(s.dir, "src", "many", map[string]string{"tiny": "8", "debian": "9"}[m])); err != nil {
			t.Fatal(err)
		}
		gone := dir + map[string]string{"tiny": "/many/8", "debian": "/many/9"}[m]
		s.equal(m+" hears of changes", on(m, "end=$(($(date +%s) + 20)); while [ $(date +%s) -lt $end ]; do "+
			"[ $(stat -c %s "+dir+"/many/7) = 16 ] && [ ! -e "+gone+" ] && [ -e "+dir+"/many/new-for-"+m+" ] && echo yes && exit; sleep 0.1; done; echo no"), "yes\n")
		s.write("src/many/7", "x")
	}
	on("debian", "dd if=/etc/hostname of=/srv/out/synced conv=fsync status=none && sync /srv/out")
	s.equal("a file that was synced", host("out/synced"), "debian\n")

	// A supervisor that dies takes nothing with it that the next one does not bring
	// back: not even a file that is open.
	s.ok("exec", "debian", "--", "nohup sh -c 'exec 3</home/lab/src/file; until [ -e /tmp/go ]; do sleep 0.1; done; cat <&3 >/tmp/got' >/dev/null 2>&1 &")
	s.kill(s.supervisor())
	for m, dir := range src {
		s.equal(m+" after the supervisor was killed", on(m, "cat "+dir+"/file; echo "+m+" >/srv/out/"+m), "one, and then another\n")
		s.equal("written", host("out/"+m), m+"\n")
	}
	s.equal("a file that was open", on("debian", "touch /tmp/go; until [ -s /tmp/got ]; do sleep 0.1; done; cat /tmp/got"), "one, and then another\n")

	// So does an agent that dies, with all it has started.
	s.lab("exec", "tiny", "--", "kill -9 $(pidof lab-agent)")
	s.equal("after the agent was killed", on("tiny", "until [ -e /src/file ] && [ -e /srv/out/tiny ]; do sleep 0.1; done; cat /src/file; grep -c fuse.lab /proc/mounts"), "one, and then another\n2\n")

	s.ok("stop", "tiny")
	s.ok("start", "tiny")
	s.equal("after a stop", on("tiny", "cat /src/file"), "one, and then another\n")
	s.ok("replace", "tiny", "--yes") // blue-green: for a while both have the mounts
	s.equal("after a replacement", on("tiny", "cat /src/file"), "one, and then another\n")
	if out := s.ok("diff", "tiny"); !strings.Contains(out, "no differences") {
		s.Errorf("drift: %s", out)
	}
	s.write("Labfile", strings.Replace(mounted, "./src:/src", "./src:/other", 1))
	s.fails(2, []string{}, "plan")
	s.ok("destroy", "--yes")
	s.equal("after the lab", host("src/file"), "one, and then another\n")
}
