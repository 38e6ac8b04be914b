using System.Diagnostics;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// An explicit test of this program, run in another process: where a fault must not persist, or where two processes share a device.
/// </summary>
internal sealed class OtherProcess : IDisposable
{
    private readonly Process _process;
    private readonly Task<string> _output, _errors;

    private OtherProcess(ProcessStartInfo start)
    {
        _process = Process.Start(start)!;
        _errors = _process.StandardError.ReadToEndAsync();
        _output = _process.StandardOutput.ReadToEndAsync();
    }

    /// <param name="test">Class and method.</param>
    /// <param name="variables">Environment variables to set, or with null to remove.</param>
    public static OtherProcess Run(string test, params (string Name, string? Value)[] variables)
    {
        string program = Path.ChangeExtension(typeof(OtherProcess).Assembly.Location, null);
        ProcessStartInfo start = new(program, ["-explicit", "on", "-method", $"*{test}"])
        {
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        foreach ((string name, string? value) in variables)
        {
            if (value is null)
                start.Environment.Remove(name);
            else
                start.Environment[name] = value;
        }

        return new OtherProcess(start);
    }

    /// <summary>Its output, once it has ended.</summary>
    public async Task<string> Ended()
    {
        await _process.WaitForExitAsync(TestContext.Current.CancellationToken).WaitAsync(TimeSpan.FromSeconds(90));
        return await _output + await _errors;
    }

    public async Task Succeeded()
    {
        string output = await Ended();
        Assert.True(output.Contains("Total: 1, Errors: 0, Failed: 0", StringComparison.Ordinal), output);
    }

    public void Dispose()
    {
        if (!_process.HasExited)
            _process.Kill();
        _process.Dispose();
    }
}
