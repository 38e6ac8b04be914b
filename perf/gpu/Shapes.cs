using Rollout.Engine;

namespace Rollout.Gpu;

/// <summary>The measured models: their config.json, in shapes/; on the simulated device the golden models'.</summary>
internal static class Shapes
{
    public const string Qwen25 = "Qwen2.5-0.5B", Qwen3 = "Qwen3-0.6B", Llama = "Llama-3.1-8B", Qwen38B = "Qwen3-8B";

    private static readonly Dictionary<string, string> s_small = new()
    {
        [Qwen25] = "qwen2",
        [Qwen3] = "qwen3",
        [Llama] = "llama3",
        [Qwen38B] = "qwen3",
    };

    public static IReadOnlyList<string> All { get; } = [Qwen25, Qwen3, Llama, Qwen38B];

    /// <summary>The folder with the model's config.json.</summary>
    public static string Folder(string name, bool isSmall)
        => isSmall ? GoldenFolder(s_small[name]) : Path.Combine(AppContext.BaseDirectory, "shapes", name);

    public static ModelSpec Load(string name, bool isSmall) => ModelSpec.Load(Folder(name, isSmall));

    /// <summary>A model of tests/golden, with weights.</summary>
    public static string GoldenFolder(string family) => Path.Combine(Stage.Root, "tests", "golden", family);
}
