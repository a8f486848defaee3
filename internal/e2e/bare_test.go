// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/labfile/lab/internal/guest/agentapi"
	"github.com/labfile/lab/internal/guest/channel"
	"github.com/labfile/lab/providers"
)

// bare boots a box by a QEMU command line of the kind that one writes by hand.
type bare struct {
	disk, format, kernel, initrd, append string
	memory, cpus, accel, cpu             string
	hostKey                              []byte
}

// newBare learns from the running machine what the box consists of.
func newBare(s *site) bare {
	s.Helper()
	var args []string
	for _, p := range s.mine() {
		if p.is("qemu-system") {
			args = p.args
		}
	}
	value := func(flag string) string {
		for i, a := range args[:max(0, len(args)-1)] {
			if a == flag {
				return args[i+1]
			}
		}
		s.Fatalf("QEMU runs without %s: %q", flag, args)
		return ""
	}
	var disk struct {
		Backing struct {
			Driver string `json:"driver"`
			File   struct {
				Filename string `json:"filename"`
			} `json:"file"`
		} `json:"backing"`
	}
	if err := json.Unmarshal([]byte(value("-blockdev")), &disk); err != nil {
		s.Fatal(err)
	}
	key := filepath.Join(s.dir, "key")
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).CombinedOutput(); err != nil {
		s.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	return bare{
		disk: disk.Backing.File.Filename, format: disk.Backing.Driver,
		kernel: value("-kernel"), initrd: value("-initrd"), append: value("-append"),
		memory: value("-m"), cpus: value("-smp"), accel: value("-accel"), cpu: value("-cpu"), hostKey: read(s, key),
	}
}

// boot returns the time from the creation of the overlay until the agent has
// taken its identity.
func (m bare) boot(s *site) time.Duration {
	s.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	overlay, socket := filepath.Join(s.dir, "bare.qcow2"), filepath.Join(s.w.run, "bare")
	began := time.Now()
	if out, err := s.command(ctx, nil, "qemu-img", "create", "-q", "-f", "qcow2", "-F", m.format, "-b", m.disk, overlay).CombinedOutput(); err != nil {
		s.Fatalf("qemu-img: %v\n%s", err, out)
	}
	qemu := s.command(ctx, nil, "qemu-system-x86_64", "-nodefaults", "-machine", "q35", "-accel", m.accel, "-cpu", m.cpu,
		"-smp", m.cpus, "-m", m.memory, "-display", "none", "-serial", "null",
		"-kernel", m.kernel, "-initrd", m.initrd, "-append", m.append,
		"-drive", "file="+overlay+",format=qcow2,if=virtio,cache=unsafe",
		"-nic", "user,model=virtio-net-pci,mac=52:54:00:00:02:0f",
		"-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci", "-chardev", "socket,id=agent,server=on,wait=off,path="+socket,
		"-device", "virtserialport,chardev=agent,name="+providers.AgentPort)
	var log strings.Builder
	qemu.Stdout, qemu.Stderr = &log, &log
	if err := qemu.Start(); err != nil {
		s.Fatal(err)
	}
	defer func() {
		_ = qemu.Process.Kill()
		_ = qemu.Wait()
	}()
	m.identify(ctx, s, socket, log.String)
	return time.Since(began)
}

// identify waits until the agent behind a socket has taken its identity.
func (m bare) identify(ctx context.Context, s *site, socket string, log func() string) {
	s.Helper()
	var conn net.Conn
	s.wait("QEMU listens: "+log(), func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", socket)
		return err == nil
	})
	session, err := channel.Client(ctx, conn)
	if err != nil {
		s.Fatal(err)
	}
	defer session.Close()
	stream, err := session.Open(ctx)
	if err != nil {
		s.Fatal(err)
	}
	if err := agentapi.Begin(ctx, stream, agentapi.Control); err != nil {
		s.Fatal(err)
	}
	_, err = agentapi.Call(ctx, stream, agentapi.Request{Op: agentapi.OpIdentify, Identity: &agentapi.Identity{
		Hostname: "m", Domain: "lab.internal", MAC: "52:54:00:00:02:0f",
		Address: netip.MustParsePrefix("10.0.2.15/24"), Gateway: netip.MustParseAddr("10.0.2.2"),
		DNS: []netip.Addr{netip.MustParseAddr("10.0.2.3")}, HostKey: m.hostKey,
		Time: time.Now(), Entropy: make([]byte, 32),
	}})
	if err != nil {
		s.Fatal(err)
	}
}
