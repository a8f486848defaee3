// SPDX-License-Identifier: Apache-2.0

package verify

import (
	"regexp"
	"testing"
	"time"

	"github.com/labfile/lab/internal/lab"
)

// FuzzFacts finds that whatever a guest prints becomes facts that can be compared,
// or an error, and that no parser leaves out an attribute that a check can name.
func FuzzFacts(f *testing.F) {
	for _, seed := range []string{
		"", "absent\n", "stat 81a4 1234 root 0 root 0\n", "stat a1ff 7 root 0 root 0\nlink /x\n",
		"root:x:0:0:root:/root:/bin/sh\nroot bin\n", "nslookup\nServer: 10.64.0.1\nAddress: 10.64.0.1:53\n\nName: db\nAddress 1: 10.64.0.10 db\n",
		"10.64.0.10     STREAM db\n", "enabled\nrunning\n", "1.2.3-1\n",
		"   0: 0100007F:1538 00000000:0000 0A 0 0 0\n   1: zz:1538 0 0A\n",
	} {
		f.Add("tcp:5432", seed)
		f.Add("udp:53", seed)
	}
	f.Add("systemd-networkd", "systemd-network\n")
	attributes := map[string][]string{
		"port": {"listening", "ip"}, "package": {"installed", "versions"}, "service": {"enabled", "running"},
		"process": {"running", "count"}, "user": {"exists", "uid", "gid", "groups", "home", "shell"}, "dns": {"resolvable", "addrs"},
		"file": {"exists", "mode", "owner", "group", "size", "filetype", "linked-to"},
	}
	isBool := regexp.MustCompile(`^(true|false)$`)
	f.Fuzz(func(t *testing.T, subject, out string) {
		for kind, parse := range map[string]func(string, string) (Facts, error){
			"port": parsePort, "package": parsePackage, "service": parseService, "process": parseProcess,
			"user": parseUser, "dns": parseDNS, "file": func(_, out string) (Facts, error) { return parseFile(out) },
		} {
			facts, err := parse(subject, out)
			if err != nil {
				continue
			}
			for i, a := range attributes[kind] {
				fact, ok := facts[a]
				if !ok {
					t.Fatalf("a %s has no %s: %q", kind, a, out)
				}
				if i == 0 && !isBool.MatchString(fact.Text) {
					t.Errorf("%s of a %s is %s", a, kind, fact)
				}
				if len(fact.String()) > 8*maxFound {
					t.Errorf("%s is rendered with %d bytes", a, len(fact.String()))
				}
				for _, op := range []lab.MatchOp{lab.MatchIs, lab.MatchGreater, lab.MatchLen} {
					if _, err := Match(fact, lab.Matcher{Op: op, Value: "1"}); err != nil {
						t.Errorf("%s %s: %v", a, op, err)
					}
				}
			}
		}
	})
}

func TestFailedErrorIsOneLine(t *testing.T) {
	e := &FailedError{Machine: "web", Total: 9}
	for _, name := range []string{"a", "b", "c", "d"} {
		e.Failed = append(e.Failed, Result{Name: name, Reason: "no answer within " + time.Second.String(), Hint: "do " + name})
	}
	want := "4 of 9 checks failed: a: no answer within 1s; b: no answer within 1s; c: no answer within 1s; and 1 more"
	if got := e.Error(); got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if got, want := e.Hint(), "a: do a\nb: do b\nc: do c\nd: do d"; got != want {
		t.Errorf("the hint is %q, want %q", got, want)
	}
}
