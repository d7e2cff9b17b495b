package compose

import "testing"

func TestCompletionIsAwaited(t *testing.T) {
	t.Parallel()
	model, err := ParseModel([]byte(`{"name": "p", "services": {
		"front": {"depends_on": {"setup": {"condition": "service_completed_successfully"}, "web": {"condition": "service_started"}}}, "setup": {}, "web": {}}}`))
	if err != nil {
		t.Fatal(err)
	}
	const label = "setup:service_completed_successfully:false,web:service_started:true"
	for service, want := range map[string]string{"setup": "front", "web": "", "front": "", "set": ""} {
		if got := model.AwaitsCompletion(service); got != want {
			t.Errorf("%s: %q, want %q", service, got, want)
		}
		if got := AwaitsCompletion(label, service); got != (want != "") {
			t.Errorf("%s: %t by the label", service, got)
		}
	}
}
