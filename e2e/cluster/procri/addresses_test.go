package procri

import (
	"net"
	"testing"
)

func newTestAddresses(t *testing.T, folder, cidr string) *addresses {
	t.Helper()
	_, subnet, err := net.ParseCIDR(cidr)
	check(t, err)
	a, err := newAddresses(folder, subnet)
	check(t, err)
	return a
}

func take(t *testing.T, a *addresses) string {
	t.Helper()
	address, err := a.take("id")
	check(t, err)
	return address.String()
}

func TestAddressesAreTakenInTurn(t *testing.T) {
	folder := t.TempDir()
	a := newTestAddresses(t, folder, "10.1.0.0/29")
	equal(t, gateway(a.subnet).String(), "10.1.0.1")
	equal(t, take(t, a), "10.1.0.2")
	equal(t, take(t, a), "10.1.0.3")
	check(t, a.release(net.ParseIP("10.1.0.2")))
	check(t, a.release(net.ParseIP("10.1.0.2")))
	// An address that has just become free comes last.
	for _, want := range []string{"10.1.0.4", "10.1.0.5", "10.1.0.6", "10.1.0.2"} {
		equal(t, take(t, a), want)
	}
	if _, err := a.take("id"); err == nil {
		t.Fatal("an address too many")
	}
	// A new procri has every address, and goes on where the last one was.
	a = newTestAddresses(t, folder, "10.1.0.0/29")
	equal(t, take(t, a), "10.1.0.3")
	a = newTestAddresses(t, folder, "10.2.0.0/29")
	equal(t, take(t, a), "10.2.0.2")
}

func TestAddressesRefuseBadSubnets(t *testing.T) {
	for _, cidr := range []string{"fd00::/64", "10.0.0.0/31"} {
		_, subnet, err := net.ParseCIDR(cidr)
		check(t, err)
		if _, err := newAddresses(t.TempDir(), subnet); err == nil {
			t.Errorf("%s was accepted", cidr)
		}
	}
}
