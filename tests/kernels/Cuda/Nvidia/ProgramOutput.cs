using System.Diagnostics;
using Xunit;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>A compiler or tool, run to its end.</summary>
internal static class ProgramOutput
{
    /// <summary>Its standard output. When it fails the test fails, with its standard error.</summary>
    public static async Task<string> Of(string program, params string[] arguments)
    {
        ProcessStartInfo start = new(program, arguments) { RedirectStandardOutput = true, RedirectStandardError = true };
        using Process process = Process.Start(start)!;
        Task<string> errors = process.StandardError.ReadToEndAsync();
        string output = await process.StandardOutput.ReadToEndAsync();
        await process.WaitForExitAsync();
        Assert.True(process.ExitCode == 0, $"{Path.GetFileName(program)} ended with {process.ExitCode}: {await errors}");
        return output;
    }
}
