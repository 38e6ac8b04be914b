namespace Rollout.Gpu;

/// <summary>NVIDIA's programs, on the PATH or in the toolkit.</summary>
internal static class Programs
{
    /// <summary>The program's path, or null.</summary>
    public static string? Find(string name)
    {
        string[] folders = [.. (Environment.GetEnvironmentVariable("PATH") ?? "").Split(':'), "/usr/local/cuda/bin"];
        return folders.Select(folder => Path.Combine(folder, name)).FirstOrDefault(File.Exists);
    }
}
