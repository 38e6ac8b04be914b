using System.Diagnostics;

namespace Rollout.Gpu;

/// <summary>Runs the scripts beside this program with the machine's python3.</summary>
internal static class Python
{
    public static string Script(string name) => Path.Combine(AppContext.BaseDirectory, name);

    /// <summary>Whether python3 is installed and can import a module.</summary>
    public static async Task<bool> HasAsync(string module)
    {
        try
        {
            ProcessStartInfo info = new("python3", ["-c", $"import {module}"]) { RedirectStandardError = true };
            using Process process = Process.Start(info)!;
            await process.StandardError.ReadToEndAsync();
            await process.WaitForExitAsync();
            return process.ExitCode == 0;
        }
        catch (System.ComponentModel.Win32Exception)
        {
            return false;
        }
    }

    /// <summary>The lines that a script prints; they go to the log too.</summary>
    public static async Task<IReadOnlyList<string>> RunAsync(string script, IEnumerable<string> arguments)
    {
        if (!await HasAsync("sys")) return ["python3 is not installed"];
        ProcessStartInfo info = new("python3", [Script(script), .. arguments]) { RedirectStandardOutput = true };
        info.Environment["PYTHONUNBUFFERED"] = "1";
        using Process process = Process.Start(info)!;
        List<string> lines = [];
        while (await process.StandardOutput.ReadLineAsync() is { } line)
        {
            await Console.Error.WriteLineAsync(line);
            lines.Add(line);
        }

        await process.WaitForExitAsync();
        if (process.ExitCode != 0) throw new InvalidOperationException($"{script} ended with {process.ExitCode}; the log has why");
        return lines;
    }
}
