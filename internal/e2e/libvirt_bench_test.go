// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/labfile/lab/providers"
	"github.com/labfile/lab/providers/libvirt/daemontest"
)

// scripted is a domain such as one writes by hand: the same box, to the same point.
const scripted = `<domain type='%s'>
  <name>by-hand</name>
  <memory unit='KiB'>%s</memory>
  <vcpu>%s</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>%s</kernel><initrd>%s</initrd><cmdline>%s</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'>%s</cpu>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='unsafe'/>
      <source file='%s'/><target dev='vda' bus='virtio'/>
    </disk>
    <interface type='user'><mac address='52:54:00:00:02:0f'/><model type='virtio'/></interface>
    <serial type='null'/>
    <channel type='unix'>
      <source mode='bind' path='%s'/><target type='virtio' name='` + providers.AgentPort + `'/>
    </channel>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='none'/>
  </devices>
</domain>
`

// virsh is a machine that a script keeps by means of virsh and qemu-img alone.
type virsh struct {
	*site
	bare
	uri, overlay, socket, document string
}

func (v *virsh) run(name string, args ...string) {
	v.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if out, err := v.command(ctx, nil, name, args...).CombinedOutput(); err != nil {
		v.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func (v *virsh) virsh(args ...string) {
	v.Helper()
	v.run("virsh", append([]string{"-q", "-c", v.uri}, args...)...)
}

func (v *virsh) up() time.Duration {
	v.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	began := time.Now()
	v.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", v.format, "-b", v.disk, v.overlay)
	v.virsh("define", v.document)
	v.virsh("start", "by-hand")
	v.identify(ctx, v.site, v.socket, func() string { return "" })
	return time.Since(began)
}

func (v *virsh) destroy() time.Duration {
	v.Helper()
	began := time.Now()
	v.virsh("destroy", "by-hand")
	v.virsh("undefine", "by-hand")
	if err := os.Remove(v.overlay); err != nil {
		v.Fatal(err)
	}
	return time.Since(began)
}

// BenchmarkLibvirt measures up, replace and destroy through a session's libvirt against
// a script of virsh and qemu-img commands that does the same. The daemon is one whose
// dead are buried at once: libvirt waits until a QEMU that ended is, which on a host
// whose init is slow to do it takes longer than all the rest.
func BenchmarkLibvirt(b *testing.B) {
	d := daemontest.Start(b)
	bench(b, func(s *site) {
		s.ok("up") // pins the box, and shows what it consists of
		v := &virsh{
			site: s, bare: newBare(s), uri: strings.Replace(d.URI(), "qemu:", "qemu+unix:", 1),
			overlay: filepath.Join(s.dir, "by-hand.qcow2"), socket: filepath.Join(s.w.run, "by-hand"),
			document: filepath.Join(s.dir, "by-hand.xml"),
		}
		s.ok("destroy", "--yes")
		kind := "qemu"
		if strings.HasPrefix(v.accel, "kvm") {
			kind = "kvm"
		}
		var without strings.Builder
		for _, name := range strings.Split(v.cpu, ",-")[1:] { // as the provider says it to QEMU
			fmt.Fprintf(&without, "<feature policy='disable' name='%s'/>", name)
		}
		memory := strings.TrimSuffix(strings.TrimPrefix(v.memory, "size="), "k") // as well
		s.write("by-hand.xml", fmt.Sprintf(scripted, kind, memory, v.cpus, v.kernel, v.initrd, v.append, &without, v.overlay, v.socket))
		lab := func(args ...string) time.Duration {
			r := s.lab(args...)
			if r.code != 0 {
				s.Fatal(r)
			}
			return r.took
		}
		up := func() time.Duration { return lab("up", "--provider", "libvirt", "--uri", d.URI()) }
		up() // has the daemon look at its hypervisors
		lab("destroy", "--yes")
		took := map[string][]time.Duration{}
		note := func(what string, d time.Duration) { took[what] = append(took[what], d) }
		for range rounds {
			note("up", up())
			note("replace", lab("replace", "--all", "--yes"))
			note("destroy", lab("destroy", "--yes"))
			note("virsh-up", v.up())
			note("virsh-replace", v.destroy()+v.up())
			note("virsh-destroy", v.destroy())
		}
		at := func(what string) float64 { slices.Sort(took[what]); return took[what][rounds/2].Seconds() }
		for _, what := range []string{"up", "replace", "destroy"} {
			b.ReportMetric(at(what), "s/"+what)
			b.ReportMetric(at("virsh-"+what), "s/virsh-"+what)
			b.ReportMetric(at(what)/at("virsh-"+what), what+"/virsh")
		}
	}, "lab: bench\nmachines: {m: {box: builtin/tiny, replace: {keep: 0}}}\n")
}

// BenchmarkLibvirtNetwork measures what two machines of another host send each other, through
// the lab's switch on this one and where they run. The other host is a network namespace of
// this one, so that the way there is shorter than any other.
func BenchmarkLibvirtNetwork(b *testing.B) {
	s, _, uri := farSite(b, accounts[len(accounts)-1].world(b), pair)
	const size = 16 << 20
	for b.Loop() {
		took := map[string]time.Duration{}
		for _, kind := range []string{"switch", "isolated"} {
			s.write("Labfile", at(uri, strings.Replace(pair, "\n", "\nnetwork: "+kind+"\n", 1)))
			s.ok("up", "--yes")
			took[kind] = median(rounds, func() time.Duration { return sent(s, size) })
			b.ReportMetric(rate(size, took[kind]), "Mbit/s-"+kind)
		}
		b.ReportMetric(took["switch"].Seconds()/took["isolated"].Seconds(), "switch/isolated")
		s.ok("destroy", "--yes")
	}
	b.ReportMetric(0, "ns/op")
}
