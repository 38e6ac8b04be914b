namespace Rollout.Gpu;

/// <summary>Stage 4: the most important measurements first, in case time runs out.</summary>
internal static class Rates
{
    public static IReadOnlyList<Part> Parts { get; } =
    [
        Steps(Shapes.Qwen25, 25),
        Steps(Shapes.Llama, 40),
        new($"{Shapes.Qwen25}, nano", 20, stage => Rollouts.NanoAsync(stage, Shapes.Qwen25)),
        new($"{Shapes.Qwen25}, GRPO", 20, stage => Rollouts.GrpoAsync(stage, Shapes.Qwen25)),
        new($"{Shapes.Qwen25}, GRPO through gRPC", 40, Served.RunAsync),
        new($"{Shapes.Qwen3}, nano", 40, stage => Rollouts.NanoAsync(stage, Shapes.Qwen3)),
        Steps(Shapes.Qwen3, 30),
        new($"{Shapes.Qwen38B}, GRPO", 50, stage => Rollouts.GrpoAsync(stage, Shapes.Qwen38B)),
        new($"{Shapes.Qwen38B}, long", 60, stage => Rollouts.LongAsync(stage, Shapes.Qwen38B)),
        Steps(Shapes.Qwen38B, 40),
    ];

    private static Part Steps(string name, int seconds) => new($"{name}, steps", seconds, stage => StepRates.Run(stage, name));
}
